"""What cells showed, one file for each cell and seed. Nothing else reads or writes these files.

    GRID.CELL.SEED.KEY.json

A file holds all that claims and page need, so that a machine with an empty store goes on where another one ended. It is
found by its key, the fingerprint of what it depends on, whichever grid and cell it is named after. What would give
other numbers has another key, and so another file. Of two commands that measure one cell at once the later one replaces
the file of the other. A file names all cells that it was used for, so that a page can be made of it by a later version
too, which gives other keys.
"""

import functools
import json
import logging
import math
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

import vila_ops
from vila_ops.ablate.cells import CellRun, fingerprint_of, stages_of
from vila_ops.artifacts import output, store
from vila_ops.artifacts.kinds import Checkpoint, EvalReport
from vila_ops.config import NO_CONTEXT, Config, fingerprint
from vila_ops.config.grid import Grid
from vila_ops.errors import did_you_mean
from vila_ops.eval.compare import ScoreTable
from vila_ops.eval.opened import opened
from vila_ops.eval.report import LayerPoint, ReportMetric, read_report
from vila_ops.pipeline.cost import TaskCost, cost_of
from vila_ops.pipeline.reports import SEALED
from vila_ops.pipeline.stages import walk
from vila_ops.train.curve import curve_of
from vila_ops.train.pace import speed_settings, timed_positions

BEGINS = '{\n "cell": "'
"""How a file begins: keys are sorted."""
POINTS = 500
"""Points of a loss; a longer one has the means of consecutive steps."""
DIGITS = 7
"""Significant digits of scores and losses, which are computed in fp32."""
OURS = "vila-ops"
"""The key of our own version and commit among the versions."""
NUMERIC = ("torch", "transformers")
"""Packages of which another version may give other numbers."""
log = logging.getLogger(__name__)


class ScoredItems(Config):
    """The items that one or more metrics are of."""

    names: tuple[str, ...]
    groups: tuple[str, ...]
    slices: tuple[tuple[str, ...], ...]
    """None at all where no item is in one."""
    references: str
    """A hash of what the items are scored by."""


class ItemScores(Config):
    """What a model scored by one metric, item by item."""

    items: int
    """Place of its items in the list of the file."""
    statistic: Literal["mean", "mean_of_means", "ratio"]
    lower_is_better: bool
    unit: str
    columns: tuple[tuple[float, ...], ...]
    """Of values with one column: one."""


class CellTask(Config):
    """A stage or the evaluation of a cell, and what it took."""

    task: Literal["train", "evaluate"]
    name: str
    key: str
    """The same for a stage or an evaluation that cells share."""
    seconds: float
    gpu_hours: float
    positions: int | None
    """Token positions that a stage trained on, padding included."""
    timed_positions: int | None = None
    """Those of its last attempt, which `seconds` is the time of."""
    money: float | None
    settings: dict[str, Any] = {}
    """Of a stage and its model, as by `speed_settings`."""


class CellResult(Config):
    """A cell with one seed: what was measured, and what it took."""

    grid: str
    cell: str
    seed: int
    shared_with: tuple[str, ...] = ()
    """Other cells that are the same model measured on the same suite, as GRID.CELL.SEED."""
    key: str
    """Fingerprint of what the result depends on, see `fingerprint_of`."""
    stage: str
    """The model after it is measured."""
    model: str
    """Digest of the model."""
    report: str
    """Digest of its report."""
    metrics: tuple[ReportMetric, ...]
    items: tuple[ScoredItems, ...]
    scores: dict[str, ItemScores]
    """By metric, of those whose value is a mean or a ratio of sums."""
    layers: tuple[LayerPoint, ...]
    """Of the model, and of its control where there is one."""
    losses: dict[str, tuple[tuple[int, float], ...]]
    """By stage, the training loss by step."""
    tasks: tuple[CellTask, ...]
    versions: dict[str, str]
    """Of Python, of packages that results depend on, and of vila-ops with its commit."""

    @property
    def names(self) -> set[str]:
        """All cells that it is of, as GRID.CELL.SEED."""
        return {f"{self.grid}.{self.cell}.{self.seed}", *self.shared_with}

    def file_name(self) -> str:
        """The name of its file."""
        return f"{self.grid}.{self.cell}.{self.seed}.{self.key[:16]}.json"


def result_of(one: CellRun, report: EvalReport) -> CellResult:
    """The result of a cell whose report is sealed. Raises CorruptArtifact."""
    read, execution = read_report(report), store.manifest_of(report)["execution"]
    trained = _trained(one)
    tables = {name: table for benchmark in opened(report).values() for name, table in benchmark.scores().items()}
    items, scores = _compact(tables)
    key = fingerprint_of(one)
    measuring = cost_of("evaluate", read.suite, report.uri, one.run.resources)
    return CellResult(
        grid=one.grid,
        cell=one.cell,
        seed=one.seed,
        key=key,
        stage=one.stage,
        model=read.model,
        report=report.digest,
        metrics=read.metrics,
        items=items,
        scores=scores,
        layers=read.layers,
        losses={checkpoint.stage: _losses(checkpoint) for checkpoint in trained},
        tasks=(*_stages(one, trained), _task("evaluate", read.suite, key, measuring)),
        versions={"python": execution["python"], **execution["versions"], OURS: _ours()},
    )


@functools.cache
def _ours() -> str:
    """Our version, with the last commit of the package where it runs from a checkout; + where files were changed."""
    folder = Path(vila_ops.__file__).parent

    def git(*options: str) -> str:
        ran = subprocess.run(["git", *options, "--", "."], cwd=folder, capture_output=True, text=True, check=False)
        return ran.stdout.strip()

    try:
        commit = git("log", "-1", "--format=%h")
        changed = "+" if commit and git("status", "--porcelain") else ""
    except OSError:  # no git on this machine
        return vila_ops.__version__
    return f"{vila_ops.__version__} {commit}{changed}".strip()


def _trained(one: CellRun) -> list[Checkpoint]:
    """The sealed models after the stages of a cell."""
    count = 1 + len(one.stages())  # later stages may not be there
    models = [result.model for result in islice(walk(one.run, SEALED, NO_CONTEXT), count)]
    return [model for model in models if isinstance(model, Checkpoint)]


def _stages(one: CellRun, trained: Sequence[Checkpoint]) -> Iterable[CellTask]:
    for part, checkpoint in zip(stages_of(one, in_store=False), trained, strict=True):
        cost = cost_of("train", part.stage.name, checkpoint.uri, one.run.resources)
        settings = speed_settings(part.stage.model_dump(mode="json"), part.model)
        timed = timed_positions(store.manifest_of(checkpoint))
        task = _task("train", part.stage.name, part.at.key, cost)
        yield task.with_changes({"settings": settings, "timed_positions": timed})


def _task(task: Literal["train", "evaluate"], name: str, key: str, cost: TaskCost) -> CellTask:
    return CellTask(
        task=task,
        name=name,
        key=key,
        seconds=cost.seconds,
        gpu_hours=cost.gpu_hours,
        positions=cost.positions,
        money=cost.money,
    )


def _losses(checkpoint: Checkpoint) -> tuple[tuple[int, float], ...]:
    """The finite losses of a stage. Steps of equal stages are the same, so that seeds can be averaged."""
    rows = [(row["step"], row["loss"]) for row in curve_of(checkpoint) if math.isfinite(row.get("loss", math.nan))]
    size = math.ceil(len(rows) / POINTS)
    parts = [rows[start : start + size] for start in range(0, len(rows), size or 1)]
    return tuple((part[-1][0], _rounded(sum(loss for _, loss in part) / len(part))) for part in parts)


def _compact(tables: Mapping[str, ScoreTable]) -> tuple[tuple[ScoredItems, ...], dict[str, ItemScores]]:
    """Tables of scores with their items once. A statistic that is a function has no place in a file."""
    places: dict[ScoredItems, int] = {}
    scores = {}
    for metric, table in tables.items():
        if not isinstance(table.statistic, str):
            continue
        items = ScoredItems(
            names=table.items,
            groups=table.groups,
            slices=table.slices if any(table.slices) else (),
            references=fingerprint(dict(table.references)),
        )
        columns = table.values.reshape(len(table.items), -1).T
        scores[metric] = ItemScores(
            items=places.setdefault(items, len(places)),
            statistic=table.statistic,
            lower_is_better=table.lower_is_better,
            unit=table.unit,
            columns=tuple(tuple(map(_rounded, column.tolist())) for column in columns),
        )
    return tuple(places), scores


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def scores_of(grid: Grid, results: Sequence[CellResult]) -> dict[str, dict[str, list[ScoreTable]]]:
    """The scores by metric and cell, a table for each seed. Raises ValueError for a metric that a result lacks."""
    scores: dict[str, dict[str, list[ScoreTable]]] = {metric: {} for metric in grid.metrics}
    for one in results:
        check_metrics(grid, one)
        for metric in grid.metrics:
            scores[metric].setdefault(one.cell, []).append(_table(one, metric))
    return scores


def check_metrics(grid: Grid, one: CellResult) -> None:
    """Raise ValueError for a metric of a grid that the result of one of its cells lacks."""
    for metric in grid.metrics:
        if metric not in one.scores:
            raise ValueError(
                f"grid {grid.name!r} shows {metric!r}, and the report of its cell {one.cell!r} has no such metric "
                f"whose value is a mean or a ratio of its items; those are {list(one.scores)}"
                f"{did_you_mean(metric, one.scores)}"
            )


def _table(one: CellResult, metric: str) -> ScoreTable:
    own = one.scores[metric]
    items = one.items[own.items]
    values = np.array(own.columns, dtype=np.float64).T
    return ScoreTable(
        items=items.names,
        groups=items.groups,
        slices=items.slices or ((),) * len(items.names),
        values=values[:, 0] if len(own.columns) == 1 else values,
        statistic=own.statistic,
        lower_is_better=own.lower_is_better,
        unit=own.unit,
        references=dict.fromkeys(items.names, items.references),
    )


def make_folder(folder: Path) -> None:
    """Make the folder of results, and raise ValueError where no file can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"--results is {folder}, where no file can be written ({error}); name another folder"
        ) from error


def write_result(folder: Path, result: CellResult) -> Path:
    """Write the file of a result whole or not at all; returns it. Raises ValueError for a file that is not of ours."""
    place = folder / result.file_name()
    text = json.dumps(result.model_dump(mode="json"), sort_keys=True, indent=1)
    output.write_file(place, f"{text}\n", begins=BEGINS)
    return place


def read_results(folder: Path) -> dict[str, CellResult]:
    """The results in a folder by their fingerprints; none where there is no folder.

    Of two files with one fingerprint, such as those of two machines, the first by name counts. Raises ValueError for a
    file that is no result.
    """
    results: dict[str, CellResult] = {}
    names: dict[str, str] = {}
    for name, one in _files(folder):
        if one.key in results:
            log.warning("%s and %s are of one model on one suite; %s counts", names[one.key], name, names[one.key])
            continue
        results[one.key], names[one.key] = one, name
    return results


def all_results(folder: Path) -> list[CellResult]:
    """The results in a folder, in the order of their files. Raises ValueError for a file that is no result."""
    return [one for _, one in _files(folder)]


def _files(folder: Path) -> Iterator[tuple[str, CellResult]]:
    """The results in a folder with the names of their files, in the order of these."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--results is {folder}, which is a file; name a folder")
    for path in sorted(folder.glob("*.json")):
        try:
            yield path.name, CellResult.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            why = ": ".join(part for part in (".".join(map(str, first["loc"])), first["msg"]) if part)
            raise ValueError(
                f"{path} is no result of a cell that this version reads ({why}); restore it, or move it away so that "
                f"the cell runs again"
            ) from error


def outdated(one: CellRun, results: Iterable[CellResult]) -> list[str]:
    """The files of a cell and seed, of which there is none with its fingerprint."""
    return [result.file_name() for result in results if one.name in result.names]


def results_by_name(runs: Sequence[CellRun], results: Iterable[CellResult]) -> list[CellResult]:
    """The result of each run by grid, cell and seed, of whichever version made it.

    Raises ValueError for runs without a result, and for one with several of which none has the run's fingerprint.
    """
    known = list(results)
    found: list[CellResult] = []
    missing: list[str] = []
    for one in runs:
        own = [result for result in known if one.name in result.names]
        if len(own) > 1:
            own = [result for result in own if result.key == fingerprint_of(one)] or own
        if len(own) > 1:
            raise ValueError(
                f"{one} has {len(own)} files, and none of this version: "
                f"{', '.join(of.file_name() for of in own)}; move all but one of them away"
            )
        if own:
            found.append(as_of(one, own[0]))
        else:
            missing.append(one.name)
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(runs)} cells and seeds have no file: {', '.join(missing)}; without --from-files "
            f"they are trained"
        )
    return found


def as_of(one: CellRun, result: CellResult) -> CellResult:
    """A result, which another cell may have left, under the name of a cell."""
    return result.with_changes({"grid": one.grid, "cell": one.cell, "seed": one.seed, "shared_with": ()})


def other_versions(results: Sequence[CellResult]) -> list[str]:
    """A line for each package of which results were made with several versions, and may differ by that."""
    lines = []
    for package in NUMERIC:
        cells: dict[str, list[str]] = {}
        for one in results:
            cells.setdefault(one.versions.get(package, "unknown"), []).append(f"{one.cell} {one.seed}")
        if len(cells) > 1:
            told = "; ".join(f"{version} ({', '.join(own)})" for version, own in sorted(cells.items()))
            lines.append(f"results were made with different versions of {package}: {told}")
    return lines
