"""The runs of a grid, their reports, and what they score. What is sealed is found again, so a stopped grid goes on."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vila_ops import tracking
from vila_ops.artifacts.kinds import EvalReport
from vila_ops.config import NO_CONTEXT, Resources, Run, RunContext
from vila_ops.config.grid import Grid
from vila_ops.config.load import merge
from vila_ops.config.run import BASE
from vila_ops.errors import did_you_mean
from vila_ops.eval.compare import ScoreTable
from vila_ops.eval.opened import opened
from vila_ops.pipeline.stages import TASKS, Tasks, evaluate_stage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CellRun:
    """A cell with one seed."""

    cell: str
    seed: int
    run: Run
    stage: str
    """The model after it is measured."""

    def stages(self) -> list[str]:
        """The stages that it trains, in order."""
        names = list(self.run.recipe.stages)
        return names[: names.index(self.stage) + 1] if self.stage != BASE else []


@dataclass(frozen=True)
class MeasuredCell:
    """A cell with one seed, and the report of its model."""

    of: CellRun
    report: EvalReport


def runs_of(grid: Grid, resources: Resources) -> list[CellRun]:
    """The runs of a grid: all cells with the first seed, then with the next. Raises ValueError for a wrong setting.

    Cells share what they have in common by address: data, stages before the first difference, and evaluations of them.
    """
    return [_run(grid, name, seed, resources) for seed in grid.seeds for name in grid.cells]


def _run(grid: Grid, cell: str, seed: int, resources: Resources) -> CellRun:
    recipe = {**merge(grid.recipe, grid.cells[cell].recipe), "name": f"{grid.name}-{cell}"}
    try:
        run = Run.model_validate({"recipe": recipe, "resources": resources.model_dump(mode="json")})
    except ValueError as error:
        raise ValueError(f"cell {cell!r} of grid {grid.name!r}: {error}") from error
    suite, stages = run.recipe.final_suite, [BASE, *run.recipe.stages]
    stage = grid.cells[cell].stage or stages[-1]
    if stage not in stages:
        raise ValueError(
            f"cell {cell!r} of grid {grid.name!r} measures the model after stage {stage!r}, and its recipe has "
            f"{stages}{did_you_mean(stage, stages)}"
        )
    if unmeasured := [metric for metric in grid.metrics if not suite.measures(metric)]:
        raise ValueError(
            f"grid {grid.name!r} shows {unmeasured[0]!r}, which final_suite {suite.name!r} of cell {cell!r} does not "
            f"measure; its benchmarks are {list(suite.benchmarks)}"
        )
    seeds = {f"stages.{name}.seed": one.seed + seed for name, one in run.recipe.stages.items()}
    changes: dict[str, Any] = {**seeds, "model.seed": run.recipe.model.seed + seed}
    return CellRun(cell, seed, run.with_changes({f"recipe.{key}": value for key, value in changes.items()}), stage)


def measure(
    grid: Grid, resources: Resources, *, tasks: Tasks = TASKS, context: RunContext = NO_CONTEXT
) -> list[MeasuredCell]:
    """Train each run and measure it on its final suite. The MLflow runs are children of one.

    Raises ValueError, before anything is trained, for a wrong cell or metric.
    """
    runs = runs_of(grid, resources)
    params = grid.model_dump(mode="json")
    measured = []
    with tracking.open_run(
        resources, grid.name, key=("grid", grid.fingerprint()), parent=None, params=params, tags={}
    ) as parent:
        for one in runs:
            suite, below = one.run.recipe.final_suite, context.below(parent)
            report = evaluate_stage(one.run, one.stage, suite, tasks=tasks, context=below)
            log.info("%s with seed %d is measured", one.cell, one.seed)
            measured.append(MeasuredCell(one, report))
    return measured


def scores_of(grid: Grid, measured: Sequence[MeasuredCell]) -> dict[str, dict[str, list[ScoreTable]]]:
    """The scores by metric and cell, a table for each seed. Raises ValueError for a metric that a report lacks."""
    scores: dict[str, dict[str, list[ScoreTable]]] = {metric: {} for metric in grid.metrics}
    for one in measured:
        for metric, table in _tables(one.report, grid.metrics).items():
            scores[metric].setdefault(one.of.cell, []).append(table)
    return scores


def _tables(report: EvalReport, metrics: Sequence[str]) -> dict[str, ScoreTable]:
    every = {
        name: table
        for benchmark in opened(report, metrics=metrics).values()
        for name, table in benchmark.scores().items()
    }
    if missing := [metric for metric in metrics if metric not in every]:
        raise ValueError(
            f"the final suite has no metric {missing[0]!r}; it has {list(every)}{did_you_mean(missing[0], every)}"
        )
    return {metric: every[metric] for metric in metrics}
