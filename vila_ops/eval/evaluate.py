"""The task `evaluate`: one artifact for each benchmark and model, and the report of a suite composed of them.

This module is light. What measures is imported when a benchmark was not measured yet.
"""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from vila_ops import tracking
from vila_ops.artifacts import attempts, store
from vila_ops.artifacts.execution import execution
from vila_ops.artifacts.kinds import BenchmarkResult, Checkpoint, Dataset, EvalReport, Pretrained
from vila_ops.artifacts.leases import hold
from vila_ops.cluster import device_on
from vila_ops.config import NO_CONTEXT, Resources, RunContext, Suite
from vila_ops.eval.job import EvalJob
from vila_ops.eval.needs import check_held_out
from vila_ops.eval.report import Report, compose, tracked, tracked_layers, write_report

REVISION = 4
"""Raised when a report of the same results changes; each benchmark has a revision of its own."""
log = logging.getLogger(__name__)


def evaluate(
    suite: Suite,
    model: Checkpoint | Pretrained,
    data: Dataset,
    resources: Resources,
    context: RunContext = NO_CONTEXT,
) -> EvalReport:
    """The report of a model on a suite; measures the benchmarks that the store has no result of.

    Raises CorruptArtifact for a damaged model, dataset, result or report, and ValueError for too few held-out records.
    """
    job = EvalJob(suite=suite, model=model, data=data, resources=resources)
    results = _results(job)
    if len(results) == len(suite.benchmarks) and (
        done := store.find(EvalReport, _address(job, results), store=resources.storage.store)
    ):
        return done
    if len(results) < len(suite.benchmarks):
        device_on(resources, resources.device)
    check_held_out(suite, data)
    stage = model.stage if isinstance(model, Checkpoint) else "base"
    run_id = tracking.start_run(
        resources,
        f"evaluate {stage} on {suite.name}",
        parent=context.parent_run,
        params={"suite": suite.name, "split": suite.split, "max_objects": suite.max_objects},
        tags={"task": "evaluate", "stage": stage, "model": model.digest, "data": data.digest},
    )
    failed = True
    try:
        tracking.log_input(resources, run_id, data, name=suite.mixture.name, context="eval")
        report = _report(job, run_id)
        failed = False
    finally:
        tracking.end_run(resources, run_id, failed=failed)
    log.info("evaluated %s on %s", stage, suite.name)
    return report


def _report(job: EvalJob, run_id: str | None) -> EvalReport:
    """Measure what is missing; compose, track and seal the report."""
    started = time.monotonic()
    ran = _measure_missing(job)
    results = _results(job)
    at = _address(job, results)
    with attempts.attempt(at, store=job.resources.storage.store) as attempt:
        report = compose(job.suite, model=job.model.digest, data=job.data.digest, results=results)
        _track(report, write_report(attempt, report), job.resources, run_id)
    return store.seal(
        EvalReport,
        at,
        attempt,
        facts={"suite": job.suite.name, "model": job.model.digest},
        execution=execution(launch=job.resources.launch, seconds=time.monotonic() - started, ran=ran)
        | {"mlflow_run": run_id},
    )


def _track(report: Report, file: Path, resources: Resources, run_id: str | None) -> None:
    """Log the metrics of a report, and attach its file."""
    with tracking.MetricLog(resources, run_id) as metrics:
        metrics.log(tracked(report), step=0)
        for layer, values in tracked_layers(report):  # as curves whose step is the layer
            metrics.log(values, step=layer)
        metrics.attach(file)


def _results(job: EvalJob) -> dict[str, BenchmarkResult]:
    """The results that are in the store, by the suite's names of the benchmarks."""
    return {name: result for name in job.suite.benchmarks if (result := job.result(name)) is not None}


def _address(job: EvalJob, results: Mapping[str, BenchmarkResult]) -> store.Address:
    """Where the report is that is composed of these results."""
    names = list(job.suite.benchmarks)
    return store.address(
        EvalReport,
        revision=REVISION,
        recipe={"suite": job.suite.name, "split": job.suite.split, "benchmarks": names},
        parents=(job.model.digest, job.data.digest, *(results[name].digest for name in names)),
    )


def _measure_missing(job: EvalJob) -> list[dict[str, Any]]:
    """Measure and seal what the store has no result of, in one process; returns which one, or nothing.

    The lease of one benchmark is held at a time, so that another process that needs it waits for this benchmark alone.
    What another process measures meanwhile is waited for and not measured again.
    """
    root = job.resources.storage.store
    ran: list[dict[str, Any]] = []
    measure: Callable[[str], dict[str, Any]] | None = None
    with ExitStack() as session:
        for name in (name for name in job.suite.benchmarks if job.result(name) is None):
            with hold(job.address(name), store=root):
                if job.result(name) is not None:
                    continue
                if measure is None:  # a worker may have another current folder, so the store's path is absolute
                    measure = session.enter_context(
                        _session(job.with_changes({"resources.storage.store": store.root_of(root)}))
                    )
                ran = [measure(name)]
    return ran


def _session(job: EvalJob) -> AbstractContextManager[Callable[[str], dict[str, Any]]]:
    """A process with the model loaded, which measures and seals a benchmark by the suite's name of it."""
    if job.resources.launch != "inline":
        from vila_ops.eval.ray_workers import session_on_ray

        return session_on_ray(job)
    from vila_ops.eval.runner import session  # heavy: torch, transformers

    return session(job)
