"""`vila-ops ablate`: train and measure the recipes of grids with several seeds, and say what they show."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vila_ops.cli.options import INLINE, AsJson, ResourcesFile, names_in, print_result, say
from vila_ops.cli.tables import Row, short, table
from vila_ops.errors import counted

if TYPE_CHECKING:
    from vila_ops.ablate.cost import CellCost, GridCost
    from vila_ops.ablate.verdicts import Estimate, GridResult


def ablate(
    grids: Annotated[
        list[Path],
        typer.Argument(help="Names in configs/grids, or files", metavar="GRID...", autocompletion=names_in("grids")),
    ],
    resources: ResourcesFile = INLINE,
    results: Annotated[
        Path | None,
        typer.Option("--results", help="A folder with a file for each cell and seed; a cell that has one is not run"),
    ] = None,
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
    page: Annotated[Path | None, typer.Option("--page", help="The page of one grid to write, .html or .md")] = None,
    only_files: Annotated[
        bool,
        typer.Option("--from-files", help="Take all results from --results, of any version of vila-ops; train nothing"),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train and measure each recipe of grids with every seed, and decide their claims. A stopped command goes on."""
    from vila_ops.ablate.cells import runs_of_all
    from vila_ops.ablate.measure import from_files, measure
    from vila_ops.ablate.results import read_results, scores_of
    from vila_ops.ablate.verdicts import grid_result
    from vila_ops.config.grid import load_grid
    from vila_ops.config.lengths import load_lengths
    from vila_ops.config.load import load_resources

    wanted, loaded = [load_grid(grid) for grid in grids], load_resources(resources)
    if (dry_run and page) or (lengths and not dry_run):
        idle, way = ("--page", "remove it") if dry_run else ("--lengths", "add --dry-run, or remove it")
        raise ValueError(f"{idle} has no effect {'with' if dry_run else 'without'} --dry-run; {way}")
    if only_files and (dry_run or results is None):
        raise ValueError(
            "--from-files reads the folder that --results names and runs nothing; name it, without --dry-run"
        )
    if page and len(wanted) > 1:
        raise ValueError(f"--page is the page of one grid, and {len(wanted)} are given; write one page at a time")
    if dry_run:
        from vila_ops.ablate.cost import cost_of_grid  # heavy: torch

        known = read_results(results) if results else None
        cost = cost_of_grid(runs_of_all(wanted, loaded), load_lengths(lengths) if lengths else None, results=known)
        if as_json:
            print_result(cost, as_json)
        else:
            _print_cost(cost)
        return
    if page is not None:
        from vila_ops.report import ablation

        ablation.check(page)
    if only_files and results:
        measured = from_files(wanted, loaded, results)
    else:
        measured = measure(wanted, loaded, folder=results)
    shown: list[GridResult] = []
    faults: list[str] = []
    for grid in wanted:
        try:
            shown.append(grid_result(grid, scores_of(grid, measured[grid.name])))
        except ValueError as error:
            faults.append(f"grid {grid.name!r} is not decided: {error}")
            continue
        if page is not None:
            ablation.write(page, shown[-1], measured[grid.name])
        if not as_json:
            _print(shown[-1])
    if as_json and shown:
        print_result(shown if len(wanted) > 1 else shown[0], as_json)
    if faults:
        raise ValueError("; ".join(faults))


def _print_cost(cost: "GridCost") -> None:
    left = [one for one in cost.cells if not one.done]
    rows: list[Row] = [("cell", "seed", "sealed", "shared", "to train", "tokens", "hours", "money")]
    several = len({one.grid for one in cost.cells}) > 1
    rows += [_cost_row(one, f"{one.grid} {one.cell}" if several else one.cell) for one in left]
    whole = str(sum(len(one.runs) for one in left))
    rows.append(("all", "", "", "", whole, *_amounts(cost.tokens, cost.hours, cost.money)))
    say("\n".join(table(rows)))
    if done := len(cost.cells) - len(left):
        print(f"in files, and not run again: {counted(done, 'result')}", file=sys.stderr)
    if cost.hours is not None:
        source = "stages that were timed" if cost.measured else "the planner"
        uncounted = "preparation is" if cost.evaluations else "preparation and evaluations are"
        print(f"hours are those of {source}; {uncounted} not counted", file=sys.stderr)
    if cost.unknown:
        print(f"some tokens are not known: {cost.unknown}", file=sys.stderr)
    if cost.hours is None and cost.measured:
        print("hours are not known: no such stage was timed, and the resources have no accelerator", file=sys.stderr)


def _cost_row(one: "CellCost", name: str) -> Row:
    stages = map(str, (one.seed, one.sealed, one.shared, len(one.runs)))
    return (name, *stages, *_amounts(one.tokens, one.hours, one.money))


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
        say(f"{one.verdict}: {claim.says} ({claim.metric}, {claim.compared()}: {advantage})")


def _signed(value: float) -> str:
    return f"{value:+.3f}"


def _interval(estimate: "Estimate") -> str:
    return f"[{estimate.low:.3f}, {estimate.high:.3f}]"
