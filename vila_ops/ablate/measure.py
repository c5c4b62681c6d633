"""Train and measure the runs of grids. What is sealed, or has its result in a file, is found again."""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from vila_ops import tracking
from vila_ops.ablate.cells import CellRun, fingerprint_of, not_here, runs_of_all
from vila_ops.ablate.results import (
    CellResult,
    check_metrics,
    make_folder,
    outdated,
    read_results,
    result_of,
    write_result,
)
from vila_ops.config import NO_CONTEXT, Resources, RunContext
from vila_ops.config.grid import Grid
from vila_ops.pipeline.stages import TASKS, Tasks, evaluate_stage

log = logging.getLogger(__name__)


def measure(
    grids: Sequence[Grid],
    resources: Resources,
    *,
    folder: Path | None = None,
    tasks: Tasks = TASKS,
    context: RunContext = NO_CONTEXT,
) -> dict[str, list[CellResult]]:
    """The results by grid, seed after seed; the MLflow runs of a grid are children of one.

    A cell whose result is in `folder` is taken from there, and any other leaves its result there as soon as it is
    measured. Raises ValueError, before anything is trained, for a wrong cell or metric, a folder that cannot be
    written, or a file that is no result; for a metric that no file can hold, at the first result of its grid.
    """
    runs = runs_of_all(grids, resources)
    known = read_results(folder) if folder else {}
    if folder:
        make_folder(folder)
    keys, by_name = [fingerprint_of(one) for one in runs], {grid.name: grid for grid in grids}
    for one, key in zip(runs, keys, strict=True):
        if key in known:
            check_metrics(by_name[one.grid], _as_of(one, known[key]))
            continue
        for name in outdated(one, known.values()):
            missing = ", ".join(not_here(one))
            raw = f" or was made where the raw data of {missing} is, which is not on this machine" if missing else ""
            log.warning("%s is of other settings or of another version of vila-ops%s, so %s runs again", name, raw, one)
    last = {one.grid: number for number, (one, key) in enumerate(zip(runs, keys, strict=True), 1) if key not in known}
    measured: dict[str, list[CellResult]] = {grid.name: [] for grid in grids}
    with ExitStack() as stack:
        parents: dict[str, tuple[str | None, ExitStack]] = {}
        for number, (one, key) in enumerate(zip(runs, keys, strict=True), start=1):
            if key not in known:
                if one.grid not in parents:
                    own = stack.enter_context(ExitStack())
                    parents[one.grid] = own.enter_context(_parent(by_name[one.grid], resources)), own
                suite, below = one.run.recipe.final_suite, context.below(parents[one.grid][0])
                report = evaluate_stage(one.run, one.stage, suite, tasks=tasks, context=below)
                known[key] = result_of(one, report)
                if folder:
                    write_result(folder, known[key])
                log.info("%s is measured, %d of %d", one, number, len(runs))
                check_metrics(by_name[one.grid], known[key])
            if number == last.get(one.grid) and one.grid in parents:
                parents[one.grid][1].close()
            measured[one.grid].append(_as_of(one, known[key]))
    return measured


def _parent(grid: Grid, resources: Resources) -> AbstractContextManager[str | None]:
    """The MLflow run that those of a grid's cells are below."""
    key = "grid", grid.fingerprint()
    return tracking.open_run(resources, grid.name, key=key, parent=None, params=grid.model_dump(mode="json"), tags={})


def _as_of(one: CellRun, result: CellResult) -> CellResult:
    """A result, which another cell may have left, under the name of a cell."""
    return result.with_changes({"grid": one.grid, "cell": one.cell, "seed": one.seed})
