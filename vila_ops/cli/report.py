"""`vila-ops report`: what a recipe has taken so far, and what was gained by it."""

import json
import sys
from typing import Any

from vila_ops.cli.options import INLINE, AsJson, Overrides, RecipeFile, ResourcesFile, load_run, say
from vila_ops.cli.tables import Row, table
from vila_ops.errors import counted


def report(
    recipe: RecipeFile, resources: ResourcesFile = INLINE, overrides: Overrides = None, as_json: AsJson = False
) -> None:
    """Print the time, tokens, GPU-hours, money and energy of a recipe's sealed results, and what a point of each metric
    of the gate took; make nothing."""
    from vila_ops.pipeline.explain import explain
    from vila_ops.report import cost, gains

    run, _ = load_run(recipe, resources, overrides)
    steps = explain(run)
    costs, unmade = cost.costs_of(run, steps)
    gained = gains.gains_of(run, steps)
    if as_json:
        tasks, points = [one.model_dump(mode="json") for one in costs], [one.model_dump(mode="json") for one in gained]
        say(json.dumps({"tasks": tasks, "gains": points}))
    elif costs:
        say("\n".join(table(_cells(cost.table(costs), "task", "name"))))
        if gained:
            say("\n".join(["", *table(_cells(gains.table(gained), "gain"))]))
    if unmade:
        print(f"{counted(unmade, 'task')} more would run: `vila-ops explain` says which", file=sys.stderr)


def _cells(rows: list[dict[str, Any]], *names: str) -> list[Row]:
    """The rows without empty columns. Those that name a row are one cell, by which a further table names it, too."""
    used = [key for key in rows[0] if key not in names and any(row[key] != "" for row in rows)]
    cells = [(" ".join(row[name] for name in names).rstrip(), *(str(row[key]) for key in used)) for row in rows]
    return [(names[0], *used), *cells]
