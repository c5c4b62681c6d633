"""Train and measure the runs of grids. What is sealed, or has its result in a file, is found again."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from vila_ops import tracking
from vila_ops.ablate.cells import fingerprint_of, not_here, runs_of, runs_of_all
from vila_ops.ablate.results import (
    CellResult,
    all_results,
    as_of,
    check_metrics,
    make_folder,
    other_versions,
    outdated,
    read_results,
    result_of,
    results_by_name,
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
    names: dict[str, list[str]] = {}
    for one, key in zip(runs, keys, strict=True):
        names.setdefault(key, []).append(one.name)
        if key in known:
            check_metrics(by_name[one.grid], as_of(one, known[key]))
            continue
        for name in outdated(one, known.values()):
            missing = ", ".join(not_here(one))
            raw = f" or was made where the raw data of {missing} is, which is not on this machine" if missing else ""
            log.warning("%s is of other settings or of another version of vila-ops%s, so %s runs again", name, raw, one)
    if folder:
        _name_all(folder, known, names)
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
                others = [name for name in names[key] if name != one.name]
                known[key] = result_of(one, report).with_changes({"shared_with": others})
                if folder:
                    write_result(folder, known[key])
                log.info("%s is measured, %d of %d", one, number, len(runs))
                check_metrics(by_name[one.grid], known[key])
            if number == last.get(one.grid) and one.grid in parents:
                parents[one.grid][1].close()
            measured[one.grid].append(as_of(one, known[key]))
    _warn(measured)
    return measured


def _name_all(folder: Path, known: Mapping[str, CellResult], names: Mapping[str, Sequence[str]]) -> None:
    """Write the names of further cells into the files that they use."""
    for key, own in names.items():
        if key in known and (new := set(own) - known[key].names):
            write_result(folder, known[key].with_changes({"shared_with": [*known[key].shared_with, *sorted(new)]}))


def from_files(grids: Sequence[Grid], resources: Resources, folder: Path) -> dict[str, list[CellResult]]:
    """The results by grid as `measure` gives them, from the files of whichever version, by grid, cell and seed.

    Nothing is trained or written. Raises ValueError where a cell has no file, or several.
    """
    results = all_results(folder)
    found = {grid.name: results_by_name(runs_of(grid, resources), results) for grid in grids}
    _warn(found)
    return found


def _warn(measured: Mapping[str, Sequence[CellResult]]) -> None:
    for grid, results in measured.items():
        for line in other_versions(results):
            log.warning("grid %s: %s", grid, line)


def _parent(grid: Grid, resources: Resources) -> AbstractContextManager[str | None]:
    """The MLflow run that those of a grid's cells are below."""
    key = "grid", grid.fingerprint()
    return tracking.open_run(resources, grid.name, key=key, parent=None, params=grid.model_dump(mode="json"), tags={})
