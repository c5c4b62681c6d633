"""The task `evaluate`: one artifact for each benchmark and model, and the report of a suite composed of them.

This module is light. What measures is imported when a benchmark was not measured yet.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

from vila_ops import tracing, tracking
from vila_ops.artifacts import attempts, store
from vila_ops.artifacts.execution import execution
from vila_ops.artifacts.kinds import (
    BenchmarkFiles,
    BenchmarkResult,
    Checkpoint,
    Dataset,
    Endpoint,
    EvalReport,
    Pretrained,
)
from vila_ops.artifacts.leases import hold
from vila_ops.artifacts.progress import Reporter
from vila_ops.cluster import device_on
from vila_ops.config import NO_CONTEXT, OfficialSuite, Resources, RunContext, Suite
from vila_ops.config.base import fingerprint
from vila_ops.config.benchmarks import OfficialBenchmark
from vila_ops.config.few_shot import TrainFile
from vila_ops.eval.job import EvalJob
from vila_ops.eval.needs import check_held_out
from vila_ops.eval.report import Report, compose, tracked, tracked_layers, write_report
from vila_ops.generate.load import check_installed
from vila_ops.progress import Progress
from vila_ops.tracking.tables import LoggedTable, log_tables

REVISION = 5
"""Raised when a report of the same results changes; each benchmark has a revision of its own."""
log = logging.getLogger(__name__)


def evaluate(
    suite: Suite | OfficialSuite,
    model: Checkpoint | Pretrained | Endpoint,
    data: Dataset | None,
    resources: Resources,
    context: RunContext = NO_CONTEXT,
) -> EvalReport:
    """The report of a model on a suite; measures the benchmarks that the store has no result of.

    `data` is the prepared mixture of a `Suite`; official files are read from `resources.storage.benchmarks`.
    Raises CorruptArtifact for a damaged model, dataset, result or report, and ValueError for too few held-out records,
    for official files that are missing or faulty, and for an engine that is not installed.
    """
    job = job_of(suite, model, data, resources)
    if (done := _report_of(job)) and not any(map(job.timed_out, suite.benchmarks)):
        return done
    if len(results_of(job)) < len(suite.benchmarks) and not isinstance(model, Endpoint):
        device_on(resources, resources.device)
        if resources.launch == "inline":
            check_installed(resources.evaluate.engine.kind)
    if isinstance(suite, Suite):
        assert data is not None
        check_held_out(suite, data)
    stage, step = _name_of(model), model.step if isinstance(model, Checkpoint) else 0
    with tracking.open_run(
        resources,
        f"evaluate {stage} on {suite.name}",
        key=("address", _key_of(job)),
        parent=context.parent_run,
        params={"suite": suite.name, **_held_out_params(suite)},
        tags={
            "task": "evaluate",
            "stage": stage,
            "step": str(step),
            "model": model.digest,
            "data": data.digest if data else "",
        },
    ) as run_id:
        if isinstance(suite, Suite) and data is not None:
            tracking.log_input(resources, run_id, data, name=suite.mixture.name, context="eval")
        for name, files in job.files.items():
            tracking.log_input(resources, run_id, files, name=name, context="eval")
        with tracing.work("evaluate", f"{stage} on {suite.name}", stage=stage, suite=suite.name, mlflow_run=run_id):
            report = _report(job, run_id)
    log.info("evaluated %s on %s", stage, suite.name)
    return report


def _key_of(job: EvalJob) -> str:
    """What is measured, before the results are known of which the report's address is made."""
    return fingerprint([job.suite.name, *(job.address(name).key for name in job.suite.benchmarks)])


def evaluated(
    suite: Suite | OfficialSuite, model: Checkpoint | Pretrained, data: Dataset | None, resources: Resources
) -> EvalReport | None:
    """The report of a model on a suite; None where it was not measured yet. No model is loaded."""
    return _report_of(job_of(suite, model, data, resources))


def _report_of(job: EvalJob) -> EvalReport | None:
    """The report, if it is in the store."""
    results = results_of(job)
    if len(results) < len(job.suite.benchmarks):
        return None
    return store.find(EvalReport, address_of(job, results), store=job.resources.storage.store)


def job_of(
    suite: Suite | OfficialSuite,
    model: Checkpoint | Pretrained | Endpoint,
    data: Dataset | None,
    resources: Resources,
) -> EvalJob:
    """The job of a suite on a model, with official files and train files sealed. Raises ValueError."""
    files: dict[str, BenchmarkFiles] = {}
    pools: dict[str, BenchmarkFiles] = {}
    official = {name: one for name, one in suite.benchmarks.items() if isinstance(one, OfficialBenchmark)}
    for name, one in official.items():
        from vila_ops.eval.sealed import seal_files  # heavy: Pillow

        files[name] = seal_files(one, resources)
        if one.few_shot and isinstance(one.few_shot.pool, TrainFile):
            pools[name] = seal_files(one, resources, train=True)
    return EvalJob(suite=suite, model=model, data=data, files=files, pools=pools, resources=resources)


def _name_of(model: Checkpoint | Pretrained | Endpoint) -> str:
    match model:
        case Checkpoint(stage=stage):
            return stage
        case Endpoint(name=name):
            return name
    return "base"


def _held_out_params(suite: Suite | OfficialSuite) -> dict[str, Any]:
    return {"split": suite.split, "max_objects": suite.max_objects} if isinstance(suite, Suite) else {}


def rescore(
    suite: Suite | OfficialSuite,
    model: Checkpoint | Pretrained | Endpoint,
    data: Dataset | None,
    resources: Resources,
) -> EvalReport:
    """The report of `evaluate`, made again of the answers that are sealed; no model is loaded or asked.

    What has a result is scored again and has to give the same; what has none, such as after a change of a scorer, is
    scored from its sealed shards. Raises ValueError where answers are missing, and where scores differ although the
    benchmark's REVISION does not.
    """
    from vila_ops.eval.runner import Runner  # heavy: transformers

    job = job_of(suite, model, data, resources)
    with closing(Runner(job)) as runner:
        for name in suite.benchmarks:
            runner.rescore(name)
    return _sealed_report(job, None, [], started=time.monotonic())


def _report(job: EvalJob, run_id: str | None) -> EvalReport:
    """Measure what is missing; compose, track and seal the report."""
    started = time.monotonic()
    return _sealed_report(job, run_id, _measure_missing(job), started=started)


def _sealed_report(job: EvalJob, run_id: str | None, ran: list[dict[str, Any]], *, started: float) -> EvalReport:
    results = results_of(job)
    at = address_of(job, results)
    with attempts.attempt(at, store=job.resources.storage.store) as attempt:
        data = job.data.digest if job.data else None
        report = compose(job.suite, model=job.model.digest, data=data, results=results)
        _track(job, report, write_report(attempt, report), run_id)
    return store.seal(
        EvalReport,
        at,
        attempt,
        facts={"suite": job.suite.name, "model": job.model.digest},
        execution=execution(launch=job.resources.launch, seconds=time.monotonic() - started, ran=ran)
        | {"mlflow_run": run_id},
    )


def _track(job: EvalJob, report: Report, file: Path, run_id: str | None) -> None:
    """Log the metrics of a report and the tables of its items, and attach its file."""
    with tracking.MetricLog(job.resources, run_id) as metrics:
        metrics.log(tracked(report), step=0)
        for layer, values in tracked_layers(report):  # as curves whose step is the layer
            metrics.log(values, step=layer)
        metrics.attach(file)
        if run_id is not None:
            log_tables(metrics, _item_tables(job))


def _item_tables(job: EvalJob) -> dict[str, LoggedTable]:
    """The tables of all benchmarks by their paths."""
    from vila_ops.eval.item_tables import item_tables  # heavy: Pillow
    from vila_ops.eval.runner import Runner  # heavy: transformers

    tables: dict[str, LoggedTable] = {}
    with closing(Runner(job)) as runner:
        for name in job.suite.benchmarks:
            tables |= item_tables(name, runner.shown(name), runner.planned(name).image_of)
    return tables


def results_of(job: EvalJob) -> dict[str, BenchmarkResult]:
    """The results that are in the store, by the suite's names of the benchmarks."""
    return {name: result for name in job.suite.benchmarks if (result := job.result(name)) is not None}


def address_of(job: EvalJob, results: Mapping[str, BenchmarkResult]) -> store.Address:
    """Where the report is that is composed of these results."""
    names = list(job.suite.benchmarks)
    return store.address(
        EvalReport,
        revision=REVISION,
        recipe={"suite": job.suite.name, "split": getattr(job.suite, "split", None), "benchmarks": names},
        parents=(
            job.model.digest,
            *((job.data.digest,) if job.data else ()),
            *(results[name].digest for name in names),
        ),
    )


def _measure_missing(job: EvalJob) -> list[dict[str, Any]]:
    """Measure and seal what the store has no result of; returns which processes did it, or nothing.

    The lease of one benchmark is held at a time, so that another process that needs it waits for this benchmark alone.
    What another process measures meanwhile is waited for and not measured again. Every benchmark is planned before the
    first item is asked, so that one that cannot be measured is refused early.
    """
    root = job.resources.storage.store
    missing = [name for name in job.suite.benchmarks if job.result(name) is None]
    late = [name for name in job.suite.benchmarks if job.timed_out(name)]
    ran: list[dict[str, Any]] = _ask_again(job, late) if late else []
    if not missing:
        return ran
    # a worker may have another current folder, so the store's path is absolute
    with closing(_workers(job.with_changes({"resources.storage.store": store.root_of(root)}))) as workers:
        sizes = {name: workers.plan(name) for name in missing}
        for name in missing:
            with hold(job.address(name), store=root) as lease:
                if job.result(name) is not None:
                    continue
                lease.report = reporter = _reporter(job, name)
                pending = workers.pending(name)
                total = sum(sizes[name])
                done = total - sum(sizes[name][shard] for shard in pending)
                progress = Progress(name, total, unit="request", done=done)
                reporter.begin(done, total)
                for shard in workers.answer_all(name, pending):
                    done += sizes[name][shard]
                    progress.show(done)
                    reporter.advance(done)
                lease.renew()
                ran = [workers.conclude(name)]
    return ran


def _reporter(job: EvalJob, name: str) -> Reporter:
    """Of one benchmark. An endpoint's accelerators are not ours."""
    workers = job.resources.evaluate.num_workers
    accelerator = None if isinstance(job.model, Endpoint) else job.resources.train.accelerator
    price = accelerator.price_per_hour * workers if accelerator else 0.0
    return Reporter(
        "evaluate", f"{_name_of(job.model)}: {name}", unit="requests", workers=workers, price_per_hour=price or None
    )


def _ask_again(job: EvalJob, names: Sequence[str]) -> list[dict[str, Any]]:
    """Ask an endpoint once more what timed out in benchmarks; returns which process did it."""
    from vila_ops.eval.runner import Runner  # heavy: transformers

    ran: list[dict[str, Any]] = []
    with closing(Runner(job)) as runner:
        for name in names:
            with hold(job.address(name, again=True), store=job.resources.storage.store):
                if job.timed_out(name):
                    ran = [runner.ask_again(name)]
    return ran


class ShardWorkers(Protocol):
    """The processes that measure a suite. Shards are numbered, benchmarks have the suite's names."""

    def plan(self, name: str) -> list[int]:
        """The number of requests of each shard of a benchmark. Raises ValueError where it cannot be measured."""

    def pending(self, name: str) -> list[int]:
        """The shards that are not sealed."""

    def answer_all(self, name: str, shards: Sequence[int]) -> Iterator[int]:
        """Answer and seal shards; yields the number of each when it is sealed."""

    def conclude(self, name: str) -> dict[str, Any]:
        """Score and seal a benchmark of which all shards are sealed; returns which process did it."""

    def close(self) -> None:
        """End what was started."""


def _workers(job: EvalJob) -> ShardWorkers:
    if job.resources.launch != "inline" and not isinstance(job.model, Endpoint):
        from vila_ops.eval.ray_workers import RayWorkers

        return RayWorkers(job)
    from vila_ops.eval.runner import Runner  # heavy: transformers

    return Runner(job)
