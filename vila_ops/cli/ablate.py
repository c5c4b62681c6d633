"""`vila-ops ablate`: train and measure the recipes of a grid with several seeds, and say what they show."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vila_ops.cli.options import INLINE, AsJson, ResourcesFile, print_result, say
from vila_ops.cli.tables import Row, table

if TYPE_CHECKING:
    from vila_ops.ablate.results import Estimate, GridResult


def ablate(
    grid: Annotated[Path, typer.Argument(help="A name in configs/grids, or a file", metavar="GRID")],
    resources: ResourcesFile = INLINE,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be trained; do nothing")] = False,
    as_json: AsJson = False,
) -> None:
    """Train and measure each recipe of a grid with every seed, and decide its claims. A stopped grid goes on."""
    from vila_ops.ablate.cells import runs_of, scores_of
    from vila_ops.ablate.results import grid_result
    from vila_ops.config.grid import load_grid
    from vila_ops.config.load import load_resources
    from vila_ops.pipeline.explain import explain

    wanted, loaded = load_grid(grid), load_resources(resources)
    if dry_run:
        rows: list[Row] = [("cell", "seed", "sealed", "to run")]
        for one in runs_of(wanted, loaded):
            steps = explain(one.run)
            sealed = sum(step.status == "sealed" for step in steps)
            rows.append((one.cell, str(one.seed), str(sealed), str(len(steps) - sealed)))
        say("\n".join(table(rows)))
        return
    result = grid_result(wanted, scores_of(wanted, loaded))
    if as_json:
        print_result(result, as_json)
    else:
        _print(result)


def _print(result: "GridResult") -> None:
    first = next(iter(result.grid.cells))
    say(f"{result.grid.title}\n")
    for metric in result.metrics:
        rows: list[Row] = [(metric.metric, "value", "95 % interval", f"minus {first}", "95 % interval")]
        for cell, value in metric.values.items():
            difference = metric.differences.get(cell)
            of = (_signed(difference.value), _interval(difference)) if difference else ("", "")
            rows.append((cell, f"{value.value:.3f}", _interval(value), *of))
        say("\n".join([*table(rows), ""]))
    for one in result.claims:
        claim, advantage = one.claim, f"{_signed(one.advantage.value)} {_interval(one.advantage)}"
        say(f"{one.verdict}: {claim.says} ({claim.metric}, {claim.cell} over {claim.than}: {advantage})")


def _signed(value: float) -> str:
    return f"{value:+.3f}"


def _interval(estimate: "Estimate") -> str:
    return f"[{estimate.low:.3f}, {estimate.high:.3f}]"
