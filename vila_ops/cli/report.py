"""`vila-ops report`: what a recipe has taken so far."""

import sys
from typing import Any

from vila_ops.cli.options import INLINE, AsJson, Overrides, RecipeFile, ResourcesFile, load_run, print_result, say
from vila_ops.cli.tables import Row, table
from vila_ops.errors import counted


def report(
    recipe: RecipeFile, resources: ResourcesFile = INLINE, overrides: Overrides = None, as_json: AsJson = False
) -> None:
    """Print the time, GPU-hours, tokens and money of a recipe's sealed results; make nothing."""
    from vila_ops.report import cost

    costs, unmade = cost.costs_of(load_run(recipe, resources, overrides)[0])
    if as_json:
        print_result(costs, as_json)
    elif rows := cost.table(costs):
        say("\n".join(table(_cells(rows))))
    if unmade:
        print(f"{counted(unmade, 'task')} more would run: `vila-ops explain` says which", file=sys.stderr)


def _cells(rows: list[dict[str, Any]]) -> list[Row]:
    """The rows without empty columns. Task and name are one cell, by which a further table names the task, too."""
    used = [key for key in rows[0] if key not in ("task", "name") and any(row[key] != "" for row in rows)]
    named = [f"{row['task']} {row['name']}".rstrip() for row in rows]
    return [("task", *used), *((name, *(str(row[key]) for key in used)) for name, row in zip(named, rows, strict=True))]
