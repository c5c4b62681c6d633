"""`vila-ops report`: what a recipe has taken so far."""

import sys

from vila_ops.cli.options import INLINE, AsJson, Overrides, RecipeFile, ResourcesFile, load_run, print_result, say
from vila_ops.cli.tables import table
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
        say("\n".join(table([tuple(rows[0]), *(tuple(map(str, row.values())) for row in rows)])))
    if unmade:
        print(f"{counted(unmade, 'task')} more would run: `vila-ops explain` says which", file=sys.stderr)
