"""`vila-ops ablate`: train and measure the recipes of a grid with several seeds, and say what they show."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vila_ops.cli.options import INLINE, AsJson, ResourcesFile, names_in, print_result, say
from vila_ops.cli.tables import Row, short, table

if TYPE_CHECKING:
    from vila_ops.ablate.cost import GridCost
    from vila_ops.ablate.results import Estimate, GridResult


def ablate(
    grid: Annotated[
        Path,
        typer.Argument(help="A name in configs/grids, or a file", metavar="GRID", autocompletion=names_in("grids")),
    ],
    resources: ResourcesFile = INLINE,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would train and what it takes; do nothing")
    ] = False,
    lengths: Annotated[
        Path | None,
        typer.Option(
            "--lengths",
            help="With --dry-run: a name in configs/lengths, or a file",
            autocompletion=names_in("lengths"),
        ),
    ] = None,
    page: Annotated[Path | None, typer.Option("--page", help="The page to write, .html or .md")] = None,
    as_json: AsJson = False,
) -> None:
    """Train and measure each recipe of a grid with every seed, and decide its claims. A stopped grid goes on."""
    from vila_ops.ablate.cells import measure, runs_of, scores_of
    from vila_ops.ablate.results import grid_result
    from vila_ops.config.grid import load_grid
    from vila_ops.config.lengths import load_lengths
    from vila_ops.config.load import load_resources

    wanted, loaded = load_grid(grid), load_resources(resources)
    if (dry_run and page) or (lengths and not dry_run):
        idle, way = ("--page", "remove it") if dry_run else ("--lengths", "add --dry-run, or remove it")
        raise ValueError(f"{idle} has no effect {'with' if dry_run else 'without'} --dry-run; {way}")
    if dry_run:
        from vila_ops.ablate.cost import cost_of_grid  # heavy: torch

        cost = cost_of_grid(runs_of(wanted, loaded), load_lengths(lengths) if lengths else None)
        if as_json:
            print_result(cost, as_json)
        else:
            _print_cost(cost)
        return
    if page is not None:
        from vila_ops.report import ablation

        ablation.check(page)
    measured = measure(wanted, loaded)
    result = grid_result(wanted, scores_of(wanted, measured))
    if page is not None:
        ablation.write(page, result, measured)
    if as_json:
        print_result(result, as_json)
    else:
        _print(result)


def _print_cost(cost: "GridCost") -> None:
    rows: list[Row] = [("cell", "seed", "sealed", "shared", "to train", "tokens", "hours", "money")]
    for one in cost.cells:
        stages = map(str, (one.seed, one.sealed, one.shared, len(one.runs)))
        rows.append((one.cell, *stages, *_amounts(one.tokens, one.hours, one.money)))
    whole = str(sum(len(one.runs) for one in cost.cells))
    rows.append(("all", "", "", "", whole, *_amounts(cost.tokens, cost.hours, cost.money)))
    say("\n".join(table(rows)))
    if cost.hours is not None:
        source = "sealed stages" if cost.measured else "the planner"
        print(f"hours are those of {source}; preparation and evaluations are not counted", file=sys.stderr)
    if cost.unknown:
        print(f"some tokens are not known: {cost.unknown}", file=sys.stderr)
    if cost.hours is None and cost.measured:
        print("hours are not known: the store has no sealed stage, and the resources no accelerator", file=sys.stderr)


def _amounts(tokens: float | None, hours: float | None, money: float | None) -> tuple[str, str, str]:
    return (
        "-" if tokens is None else short(tokens).strip(),
        "-" if hours is None else f"{hours:.3g}",
        "-" if money is None else f"{money:,.0f}",
    )


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
