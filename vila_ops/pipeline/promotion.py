"""The last stage's model against the champion: registered, judged by the gate, and served where it won."""

import logging

from vila_ops.artifacts.kinds import Checkpoint, Deployment, EvalReport, ModelVersion
from vila_ops.config import NO_CONTEXT, Config, Recipe, Resources, Run, RunContext
from vila_ops.errors import PromotionRaceLost
from vila_ops.eval.needs import check_held_out
from vila_ops.eval.report import read_report
from vila_ops.generate.load import check_installed
from vila_ops.pipeline.explain import explain_promotion, works
from vila_ops.pipeline.stages import TASKS, Tasks, suite_text, walk
from vila_ops.registry.register import champion
from vila_ops.serve.deploy import deploy
from vila_ops.serve.tracks import backend_of
from vila_ops.train.stage import trained_model

PROMOTION_RACES = 5
"""How often a model is judged while other models become champion meanwhile."""
log = logging.getLogger(__name__)


def register_model(
    run: Run, model: Checkpoint, report: EvalReport, *, tasks: Tasks, context: RunContext
) -> ModelVersion:
    """Register a model against the present champion, which is evaluated on the same suite.

    Where another model becomes champion meanwhile, the model is judged again, against that one.
    """
    recipe, resources = run.recipe, run.resources
    for race in range(PROMOTION_RACES):
        rival = champion(recipe.gate, resources)
        against = None
        if rival is not None and rival.checkpoint.digest != model.digest:
            against = champion_report(run, rival.checkpoint, tasks=tasks, context=context)
        try:
            return tasks.register(recipe.gate, model, report, against, resources, context)
        except PromotionRaceLost as error:
            if race + 1 == PROMOTION_RACES:
                raise
            log.warning("%s; the model is judged against the new champion", error)
    raise AssertionError("the last race returns or raises")


def champion_report(run: Run, model: Checkpoint, *, tasks: Tasks, context: RunContext) -> EvalReport:
    """A champion's report on the final suite, whose records are prepared as that model reads text and images.

    Raises ValueError for a checkpoint that does not say how.
    """
    suite, resources = run.recipe.final_suite, run.resources
    text = trained_model(model).text(max_tokens=suite.max_tokens)
    held_out = tasks.prepare(suite.mixture, text, resources, context)
    return tasks.evaluate(suite, model, held_out, resources, context)


def to_serve(recipe: Recipe, version: ModelVersion, resources: Resources) -> ModelVersion | None:
    """The version to serve: the one that the gate let through, else the champion; None where there is none."""
    return version if version.promoted else champion(recipe.gate, resources)


class MeasuredModel(Config):
    """The last stage's model, and its report on the final suite."""

    model: Checkpoint
    report: EvalReport


def candidate_of(run: Run, *, tasks: Tasks, context: RunContext) -> MeasuredModel:
    """The last stage's model, measured. Raises ValueError for a recipe without a stage and without a registry."""
    recipe, resources = run.recipe, run.resources
    if not recipe.stages:
        raise ValueError(f"recipe {recipe.name!r} has no stage, so there is nothing to register")
    champion(recipe.gate, resources)  # without a registry it fails here, before anything is trained
    *_, last = walk(run, tasks, context)
    assert isinstance(last.model, Checkpoint)
    held_out = tasks.prepare(recipe.final_suite.mixture, suite_text(recipe, last.stage), resources, context)
    check_held_out(recipe.final_suite, held_out)
    report = tasks.evaluate(recipe.final_suite, last.model, held_out, resources, context)
    return MeasuredModel(model=last.model, report=report)


def beside_champion(run: Run, candidate: MeasuredModel, *, tasks: Tasks, context: RunContext) -> list[dict[str, str]]:
    """Each metric of a candidate beside the present champion's, with 95 % intervals, a row each."""
    reports = {"the model": candidate.report}
    rival = champion(run.recipe.gate, run.resources)
    if rival is not None and rival.checkpoint.digest != candidate.model.digest:
        name = f"version {rival.version}, the champion"
        reports[name] = champion_report(run, rival.checkpoint, tasks=tasks, context=context)
    rows: dict[str, dict[str, str]] = {}
    for name, report in reports.items():
        for metric in read_report(report).metrics:
            if metric.role == "model":
                row = rows.setdefault(metric.name, {"metric": metric.name, **dict.fromkeys(reports, "")})
                row[name] = f"{metric.value:.4g} [{metric.low:.4g}, {metric.high:.4g}]"
    return list(rows.values())


def register_last(run: Run, context: RunContext = NO_CONTEXT) -> ModelVersion:
    """The registered version of the last stage's model."""
    candidate = candidate_of(run, tasks=TASKS, context=context)
    return register_model(run, candidate.model, candidate.report, tasks=TASKS, context=context)


def deploy_champion(run: Run, context: RunContext = NO_CONTEXT) -> Deployment:
    """Serve the model that the gate let through: the last stage's, or the champion where the gate refused it."""
    # where an operator serves, or the engine is missing, it fails here, before any training
    backend_of(run.recipe.service.name, run.resources)
    if run.resources.launch == "inline":
        try:
            check_installed(run.resources.serve.engine.kind)
        except ValueError:  # what is live stays so without its engine, and a start says so itself
            if works(explain_promotion(run)):
                raise
    served = to_serve(run.recipe, register_last(run, context), run.resources)
    if served is None:
        raise ValueError(
            f"the gate of {run.recipe.gate.model_name!r} has let no model through, so there is none to serve"
        )
    return deploy(run.recipe.service, served, run.resources, context)
