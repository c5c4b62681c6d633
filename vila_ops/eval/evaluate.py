"""The task `evaluate`: a model and a suite to a report with intervals. Light: the work is in `work`."""

import json
import logging
import time
from typing import Any

from vila_ops import tracking
from vila_ops.artifacts import store
from vila_ops.artifacts.execution import execution
from vila_ops.artifacts.kinds import Checkpoint, Dataset, EvalReport, Pretrained
from vila_ops.artifacts.leases import hold
from vila_ops.config import NO_CONTEXT, Resources, RunContext, Suite
from vila_ops.eval.job import EvalJob

REVISION = 3
REPORT = "report.json"
log = logging.getLogger(__name__)


def evaluate(
    suite: Suite,
    model: Checkpoint | Pretrained,
    data: Dataset,
    resources: Resources,
    context: RunContext = NO_CONTEXT,
) -> EvalReport:
    """The report of a model on a suite; measured only if the store has it not yet. Raises CorruptArtifact."""
    recipe = suite.model_dump(mode="json", exclude={"mixture"})
    at = store.address(EvalReport, revision=REVISION, recipe=recipe, parents=(model.digest, data.digest))
    if done := store.find(EvalReport, at, store=resources.storage.store):
        return done
    with hold(at, store=resources.storage.store):
        return store.find(EvalReport, at, store=resources.storage.store) or _evaluate(
            at, EvalJob(suite=suite, model=model, data=data, resources=resources), context
        )


def _evaluate(at: store.Address, job: EvalJob, context: RunContext) -> EvalReport:
    suite, model, data, resources = job.suite, job.model, job.data, job.resources
    store.verify(data)  # the model is verified by whoever loads it
    started = time.monotonic()
    attempt = store.begin(at, store=resources.storage.store)
    stage = model.stage if isinstance(model, Checkpoint) else "base"
    run_id = tracking.start_run(
        resources,
        f"evaluate {stage} on {suite.name}",
        parent=context.parent_run,
        params={"suite": suite.name, "split": suite.split, "max_objects": suite.max_objects},
        tags={"task": "evaluate", "stage": stage, "model": model.digest, "data": data.digest},
    )
    tracking.log_input(resources, run_id, data, name=suite.mixture.name, context="eval")
    failed = True
    try:
        result = _launch(job)
        (attempt / REPORT).write_text(json.dumps(result["report"], indent=1, sort_keys=True))
        with tracking.MetricLog(resources, run_id) as metrics:
            _track(result["report"], metrics)
            metrics.attach(attempt / REPORT)
        failed = False
    finally:
        tracking.end_run(resources, run_id, failed=failed)
    report = store.seal(
        EvalReport,
        at,
        attempt,
        facts={"suite": suite.name, "model": model.digest},
        execution=execution(launch=resources.launch, seconds=time.monotonic() - started, ran=[result["ran"]])
        | {"mlflow_run": run_id},
    )
    log.info("evaluated %s on %s", stage, suite.name)
    return report


def read_report(report: EvalReport) -> dict[str, Any]:
    """The content of a report. Raises CorruptArtifact."""
    found: dict[str, Any] = json.loads(store.file(report, REPORT).read_text())
    return found


def tracked(report: dict[str, Any]) -> dict[str, float]:
    """Metric names as MLflow shows them: the model's plain, the others with their role behind."""
    return {m["name"] if m["role"] == "model" else f"{m['name']}.{m['role']}": m["value"] for m in report["metrics"]}


def _track(report: dict[str, Any], metrics: tracking.MetricLog) -> None:
    """Log the metrics, and those that have a value for each layer as curves whose step is the layer."""
    metrics.log(tracked(report), step=0)
    for point in report["layers"]:
        role = "" if point["role"] == "model" else f".{point['role']}"
        metrics.log({f"{point['name']}_by_layer{role}": point["value"]}, step=point["layer"])


def _launch(job: EvalJob) -> dict[str, Any]:
    if job.resources.launch != "inline":
        from vila_ops.eval.ray_workers import run_on_ray

        return run_on_ray(job)
    from vila_ops.eval.work import run  # heavy: torch, transformers

    return run(job)
