"""The page of a grid: its claims, the paper's table and ours, losses, layers, and what each cell took.

`render` and `markdown` are pure functions of the results of cells, which are the same from a store and from files.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from markupsafe import Markup

from vila_ops.ablate.results import OURS, CellResult, CellTask, other_versions
from vila_ops.ablate.verdicts import ClaimResult, Estimate, GridResult, MetricResult, over_seeds
from vila_ops.artifacts import output
from vila_ops.report import curves, layers
from vila_ops.report.page import smoothed, thin
from vila_ops.report.panels import Panel, ReportRow, forest
from vila_ops.report.template import rendered
from vila_ops.report.words import DASH, number, signed

BEGINS = {".html": output.HTML, ".md": output.MARK}
"""How a page begins, by its suffix."""
TONES = {"shown": "good", "not shown": "", "contradicted": "bad"}
"""The colour of a verdict."""
ALL = "all cells, each task once"
NONE: Mapping[str, str] = MappingProxyType({})
Json = dict[str, Any]


@dataclass(frozen=True)
class CostRow:
    """What some tasks took together."""

    name: str
    positions: int
    hours: float
    gpu_hours: float
    money: float | None


def check(page: Path) -> None:
    """Raise ValueError where a page may not be written: another suffix, or a file that vila-ops did not write."""
    if page.suffix not in BEGINS:
        raise ValueError(f"--page is {page}, and a page is .html or .md; give it one of these suffixes")
    output.check_file(page, begins=BEGINS[page.suffix])


def write(page: Path, result: GridResult, cells: Sequence[CellResult]) -> None:
    """Write the page of a grid in the form of its suffix, with its drawings as files beside one in Markdown.

    Raises ValueError as `check` does.
    """
    check(page)
    if page.suffix == ".html":
        output.write_file(page, render(result, cells), begins=BEGINS[page.suffix])
        return
    names = {}
    for title, svg in drawings(cells).items():
        names[title] = f"{page.stem}.{title}.svg"
        output.write_file(page.with_name(names[title]), output.MARK + svg, begins=output.MARK)
    output.write_file(page, markdown(result, cells, images=names), begins=BEGINS[page.suffix])


def drawings(cells: Sequence[CellResult]) -> dict[str, str]:
    """An SVG with the losses of each stage, and one of the layers, by stage and as `layers`."""
    drawn = {stage: curves.draw(lines, legend=True) for stage, lines in losses_of(cells).items()}
    drawn["layers"] = layers.draw(layer_points(cells))
    return {title: svg for title, svg in drawn.items() if svg}


def render(result: GridResult, cells: Sequence[CellResult]) -> str:
    """The page as HTML; it loads nothing and runs no script."""
    drawn = layers.draw(layer_points(cells))
    return rendered(
        "ablation.html.jinja",
        result=result,
        grid=result.grid,
        fingerprint=result.grid.fingerprint(),
        tones=TONES,
        paper=paper_table(result),
        panels=[(metric, _panel(metric)) for metric in result.metrics],
        losses=[
            (stage, list(lines), Markup(svg))
            for stage, lines in losses_of(cells).items()
            if (svg := curves.draw(lines))
        ],
        colour=curves.colour,
        layers=Markup(drawn) if drawn else None,
        costs=costs_of(cells),
        cells=cells,
        ours=OURS,
        other_versions=other_versions(cells),
        counted={verdict: sum(one.verdict == verdict for one in result.claims) for verdict in TONES},
    )


def _panel(metric: MetricResult) -> Panel:
    rows = [
        ReportRow(cell, "model", {"value": of.value, "low": of.low, "high": of.high, "n": metric.n})
        for cell, of in metric.values.items()
    ]
    return forest(rows)


def paper_table(result: GridResult) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The columns of the paper's table, and by cell its numbers, with the decimals of their column."""
    papers = {name: cell.paper for name, cell in result.grid.cells.items()}
    fullest_first = sorted(papers.values(), key=len, reverse=True)
    columns = list(dict.fromkeys(column for paper in fullest_first for column in paper))
    decimals = {
        column: max(len(f"{paper[column]:g}".partition(".")[2]) for paper in fullest_first if column in paper)
        for column in columns
    }
    return columns, [
        (name, [f"{paper[one]:.{decimals[one]}f}" if one in paper else DASH for one in columns])
        for name, paper in papers.items()
    ]


def losses_of(cells: Sequence[CellResult]) -> dict[str, dict[str, list[curves.Step]]]:
    """The smoothed training loss of each stage, the mean over seeds; cells that share a stage share a line."""
    of: dict[str, dict[tuple[str, ...], list[CellResult]]] = {}
    names: dict[str, dict[tuple[str, ...], list[str]]] = {}
    by_cell: dict[str, list[CellResult]] = {}
    for one in cells:
        by_cell.setdefault(one.cell, []).append(one)
    for name, own in by_cell.items():
        for stage in own[0].losses:
            models = tuple(task.key for one in own for task in one.tasks if (task.task, task.name) == ("train", stage))
            of.setdefault(stage, {})[models] = own
            names.setdefault(stage, {}).setdefault(models, []).append(name)
    return {
        stage: {
            ", ".join(names[stage][models]): thin(curves.mean_of([_smooth(one, stage) for one in own]))
            for models, own in lines.items()
        }
        for stage, lines in of.items()
    }


def _smooth(one: CellResult, stage: str) -> list[curves.Step]:
    return smoothed(list(one.losses[stage]))


def layer_points(cells: Sequence[CellResult]) -> list[Json]:
    """Each layer's mean over seeds with its interval over seeds, as `layers.draw` takes it."""
    own: dict[tuple[str, str], dict[int, list[float]]] = {}
    for one in cells:
        for point in one.layers:
            own.setdefault((one.cell, point.role), {}).setdefault(point.layer, []).append(point.value)
    return [
        {"model": cell, "role": role, "layer": layer, "value": mean.value, "low": mean.low, "high": mean.high}
        for (cell, role), line in own.items()
        for layer, values in sorted(line.items())
        for mean in [over_seeds(values)]
    ]


def costs_of(cells: Sequence[CellResult]) -> list[CostRow]:
    """What each cell took over all seeds, and all of them together, where a shared task counts once."""
    names = dict.fromkeys(one.cell for one in cells)
    rows = [_cost(name, [task for one in cells if one.cell == name for task in one.tasks]) for name in names]
    return [*rows, _cost(ALL, [task for one in cells for task in one.tasks])]


def _cost(name: str, tasks: Iterable[CellTask]) -> CostRow:
    once = {task.key: task for task in tasks}.values()
    prices = [task.money for task in once if task.money is not None]
    return CostRow(
        name=name,
        positions=sum(task.positions or 0 for task in once),
        hours=sum(task.seconds for task in once) / 3600,
        gpu_hours=sum(task.gpu_hours for task in once),
        money=sum(prices) if prices else None,
    )


def markdown(result: GridResult, cells: Sequence[CellResult], *, images: Mapping[str, str] = NONE) -> str:
    """The page as Markdown. `images` has the places of its drawings, by their titles; without them it has tables."""
    grid = result.grid
    first = next(iter(grid.cells))
    differences = [
        [cell, *(_interval(one.differences[cell], sign=True) for one in result.metrics)]
        for cell in list(grid.cells)[1:]
    ]
    costs = [
        [one.name, f"{one.positions:,}", f"{one.hours:.2f}", f"{one.gpu_hours:.2f}", number(one.money)]
        for one in costs_of(cells)
    ]
    models = [
        [
            one.cell,
            str(one.seed),
            one.stage,
            f"`{one.model[:12]}`",
            f"`{one.report[:12]}`",
            one.versions.get(OURS, DASH),
        ]
        for one in cells
    ]
    parts = [
        f"# {grid.title}",
        f"Grid `{grid.name}`, seeds {', '.join(map(str, grid.seeds))}; 95 % intervals over seeds and items.",
        *(f"**{line[0].upper()}{line[1:]}.**" for line in other_versions(cells)),
        "## Claims",
        _table(["claim", "verdict", "metric", "cells", "advantage", "by seed"], map(_claim, result.claims)),
        "## The paper and ours",
        *([grid.proxies] if grid.proxies else []),
        _beside(result),
        f"## Minus {first}",
        _table(["cell", *map(_titled, result.metrics)], differences),
        "## Training loss",
        *_images(images, losses_of(cells)),
        _table(["stage", "cells", "first", "last"], _ends(cells)),
        *_layers(cells, images),
        "## What it took",
        _table(["cell", "token positions", "hours", "GPU-hours", "money"], costs),
        "## Models",
        _table(["cell", "seed", "after", "model", "report", "vila-ops"], models),
    ]
    return output.MARK + "\n\n".join(parts) + "\n"


def _beside(result: GridResult) -> str:
    """The paper's numbers and ours in one table."""
    columns, printed = paper_table(result)
    rows = [[name, *row, *(_interval(one.values[name]) for one in result.metrics)] for name, row in printed]
    return _table(["cell", *(f"paper: {column}" for column in columns), *map(_titled, result.metrics)], rows)


def _titled(metric: MetricResult) -> str:
    return f"{metric.metric} ({'lower' if metric.lower_is_better else 'higher'} is better)"


def _ends(cells: Sequence[CellResult]) -> list[list[str]]:
    """The first and the last loss of each line."""
    return [
        [stage, name, number(line[0][1]), number(line[-1][1])]
        for stage, lines in losses_of(cells).items()
        for name, line in lines.items()
        if line
    ]


def _layers(cells: Sequence[CellResult], images: Mapping[str, str]) -> list[str]:
    """The section on layers; nothing where none was measured."""
    lines: dict[str, list[str]] = {}
    for point in layer_points(cells):
        name = point["model"] if point["role"] == "model" else f"{point['model']}, shuffled"
        lines.setdefault(name, []).append(number(point["value"]))
    told = [f"- {name}: {', '.join(line)}" for name, line in lines.items()]
    return ["## Alignment by layer", *_images(images, ["layers"]), "\n".join(told)] if told else []


def _images(places: Mapping[str, str], titles: Iterable[str]) -> list[str]:
    return [f"![{title}]({places[title]})" for title in titles if title in places]


def _claim(one: ClaimResult) -> list[str]:
    by_seed = " ".join(map(signed, one.advantage.by_seed))
    claim = one.claim
    return [claim.says, one.verdict, claim.metric, claim.compared(), _interval(one.advantage, sign=True), by_seed]


def _interval(of: Estimate, *, sign: bool = False) -> str:
    form = signed if sign else number
    return f"{form(of.value)} [{form(of.low)}, {form(of.high)}]"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(head), ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in lines)
