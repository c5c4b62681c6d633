"""`vila-ops explain`: which tasks of a run will work, and why."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vila_ops.cli.options import INLINE, AsJson, Overrides, RecipeFile, ResourcesFile, load_run, print_result, say
from vila_ops.cli.tables import Row, table

if TYPE_CHECKING:
    from vila_ops.pipeline.explain import Step


def explain(
    recipe: RecipeFile, resources: ResourcesFile = INLINE, overrides: Overrides = None, as_json: AsJson = False
) -> None:
    """Say which tasks `run` would do and why, down to the setting or raw file that changed; do nothing."""
    from vila_ops.pipeline.explain import explain as steps_of

    print_steps(steps_of(load_run(recipe, resources, overrides)[0]), as_json)


def print_steps(steps: "Sequence[Step]", as_json: bool) -> None:
    """Print which tasks would work, and why, as `explain` and --dry-run do."""
    if as_json:
        print_result(steps, as_json)
        return
    rows: list[Row] = [("task", "name", "status"), *((step.task, step.name, step.status) for step in steps)]
    title, *lines = table(rows)
    say(title)
    for step, line in zip(steps, lines, strict=True):
        say("\n".join([line, *(f"    {why}" for why in step.why)]))
    counts = {status: sum(step.status == status for step in steps) for status in ("sealed", "runs", "follows")}
    more = f", {counts['follows']} that follow unless what they read comes out as it was" if counts["follows"] else ""
    print(f"{counts['sealed']} sealed, {counts['runs']} to run{more}", file=sys.stderr)
