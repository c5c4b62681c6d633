"""Train and measure the runs of grids. What is sealed, or has its result in a file, is found again."""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from vila_ops import tracking
from vila_ops.ablate.cells import fingerprint_of, runs_of_all
from vila_ops.ablate.results import CellResult, outdated, read_results, result_of, write_result
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
    measured. Raises ValueError, before anything is trained, for a wrong cell or metric, or a file that is no result.
    """
    runs = runs_of_all(grids, resources)
    known = read_results(folder) if folder else {}
    keys = [fingerprint_of(one) for one in runs]
    for one, key in zip(runs, keys, strict=True):
        for name in outdated(one, known.values()) if key not in known else ():
            log.warning("%s is of other settings or of another version of vila-ops, so %s runs again", name, one)
    measured: dict[str, list[CellResult]] = {grid.name: [] for grid in grids}
    with ExitStack() as stack:
        parents = {
            grid.name: stack.enter_context(
                tracking.open_run(
                    resources,
                    grid.name,
                    key=("grid", grid.fingerprint()),
                    parent=None,
                    params=grid.model_dump(mode="json"),
                    tags={},
                )
            )
            for grid in grids
        }
        for number, (one, key) in enumerate(zip(runs, keys, strict=True), start=1):
            if key not in known:
                suite, below = one.run.recipe.final_suite, context.below(parents[one.grid])
                report = evaluate_stage(one.run, one.stage, suite, tasks=tasks, context=below)
                known[key] = result_of(one, report)
                if folder:
                    write_result(folder, known[key])
                log.info("%s is measured, %d of %d", one, number, len(runs))
            own = {"grid": one.grid, "cell": one.cell, "seed": one.seed}
            measured[one.grid].append(known[key].with_changes(own))
    return measured
