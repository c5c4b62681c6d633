"""All tasks in their order, from data to one question to the served model. The flow and `vila-ops run` call it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from vila_ops import tracing, tracking
from vila_ops.artifacts import store
from vila_ops.artifacts.kinds import Checkpoint, Dataset, Deployment, EvalReport, ModelVersion, Pretrained
from vila_ops.config import NO_CONTEXT, Config, Run, RunContext, TextFormat
from vila_ops.eval.needs import check_held_out
from vila_ops.eval.report import read_report, tracked
from vila_ops.pipeline.promotion import register_model, to_serve
from vila_ops.pipeline.stages import TASKS, StageResult, Tasks, suite_text, walk
from vila_ops.serve.sample_query import SampleAnswer, query_sample


class Outcome(Config):
    """What a run of the whole pipeline made."""

    started: str
    """UTC, ISO 8601."""
    seconds: float
    context: RunContext
    """With the MLflow run that the tasks logged under."""
    flow_run: str | None
    """Prefect's id."""
    models: dict[str, Checkpoint | Pretrained]
    """By stage in order, `base` first."""
    datasets: dict[str, Dataset]
    """By mixture, the suites' first, as the last stage's model reads it."""
    stage_reports: dict[str, EvalReport]
    """By stage in order, `base` first."""
    report: EvalReport
    """The last stage's model on the recipe's final suite."""
    reconciled: dict[str, float]
    """Seconds of the tasks that seal nothing: `register` (with the evaluation of a champion) and `deploy`."""
    version: ModelVersion | None
    """None without a tracking URI: there is no registry then."""
    deployment: Deployment | None
    answer: SampleAnswer | None

    def checkpoints(self) -> dict[str, Checkpoint]:
        """The models of the stages, in order."""
        return {stage: model for stage, model in self.models.items() if isinstance(model, Checkpoint)}


def run_pipeline(
    run: Run, tasks: Tasks = TASKS, *, context: RunContext = NO_CONTEXT, flow_run: str | None = None
) -> Outcome:
    """Data, stages, evaluation after each, registration, deployment, and one question to what is served."""
    started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    recipe, resources = run.recipe, run.resources
    results: dict[str, StageResult] = {}
    stage_reports: dict[str, EvalReport] = {}
    held_out: dict[TextFormat, Dataset] = {}
    store.probe(resources.storage.store)  # a store that cannot be used is refused before MLflow has a run
    with _tracked(run, context, flow_run) as below:
        for result in walk(run, tasks, below):
            text = suite_text(recipe, result.stage)
            if text not in held_out:  # also where a stage has changed the size of images
                held_out[text] = tasks.prepare(recipe.final_suite.mixture, text, resources, below)
                for suite in (recipe.stage_suite, recipe.final_suite):
                    check_held_out(suite, held_out[text])
            results[result.stage] = result
            stage_reports[result.stage] = tasks.evaluate(
                recipe.stage_suite, result.model, held_out[text], resources, below
            )
        report = tasks.evaluate(recipe.final_suite, result.model, held_out[text], resources, below)
        with tracking.MetricLog(resources, below.parent_run) as metrics:
            metrics.log(tracked(read_report(report)), step=0)
        version = deployment = answer = None
        reconciled: dict[str, float] = {}
        if resources.tracking.uri is not None and isinstance(result.model, Checkpoint):
            with _timed(reconciled, "register"):
                version = register_model(run, result.model, report, tasks=tasks, context=below)
            served = to_serve(recipe, version, resources)
            if served is not None and resources.serve.started_by == "deploy":
                with _timed(reconciled, "deploy"):
                    deployment = tasks.deploy(recipe.service, served, resources, below)
                answer = query_sample(deployment, held_out[text], recipe.final_suite)
    return Outcome(
        started=started,
        seconds=round(time.monotonic() - clock, 1),
        context=below,
        flow_run=flow_run,
        models={stage: one.model for stage, one in results.items()},
        datasets={recipe.final_suite.mixture.name: held_out[text]}
        | {recipe.stages[stage].mixture.name: one.data for stage, one in results.items() if one.data is not None},
        stage_reports=stage_reports,
        report=report,
        reconciled=reconciled,
        version=version,
        deployment=deployment,
        answer=answer,
    )


@contextmanager
def _tracked(run: Run, context: RunContext, flow_run: str | None) -> Iterator[RunContext]:
    """The context below the MLflow run of this recipe, under which the tasks log: one for each fingerprint."""
    with tracking.open_run(
        run.resources,
        run.recipe.name,
        key=("recipe", run.recipe.fingerprint()),
        parent=None,
        params=run.recipe.model_dump(mode="json"),
        tags={"prefect.flow_run": flow_run or ""},
    ) as parent:
        yield context.below(parent)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.monotonic()
    with tracing.work(name, ""):
        yield
    seconds[name] = round(time.monotonic() - began, 3)
