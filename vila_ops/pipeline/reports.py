"""The sealed report that a text refers to: a report, a recipe, a version of the registry, or a run of MLflow."""

import re
from pathlib import Path
from typing import TypeVar

from vila_ops import tracking
from vila_ops.artifacts import store
from vila_ops.artifacts.kinds import Checkpoint, Dataset, EvalReport, Pretrained
from vila_ops.artifacts.listing import sealed
from vila_ops.config import (
    NO_CONTEXT,
    Mixture,
    Model,
    Resources,
    Run,
    RunContext,
    Stage,
    TextFormat,
    load,
    load_resources,
)
from vila_ops.data.preprocess.prepare import prepared
from vila_ops.eval.evaluate import evaluated
from vila_ops.model.assemble import assembled
from vila_ops.pipeline.stages import Tasks, Weights, last_stage, suite_text, walk
from vila_ops.registry.register import report_of
from vila_ops.train.stage import trained

MODELS = "models:/"
VERSION = re.compile(r"(?P<name>[^@]+)@(?P<alias>[\w.-]+)|(?P<model>.+)/(?P<number>\d+)")
"""NAME@ALIAS, or NAME/VERSION after `models:/`."""
RUN = re.compile(r"[0-9a-f]{32}")
T = TypeVar("T")


def report_named(reference: str, resources: Path) -> EvalReport:
    """The report that a reference names. `resources` is the file that says where store and registry are.

    A reference is the folder of a sealed report, on disk or s3://; a recipe (`.yaml`); a version of the registry,
    `models:/NAME/VERSION` or `NAME@ALIAS`; or the id of an MLflow run of an evaluation. Nothing is trained or measured.
    Raises ValueError, which says what is missing and how to get it, and CorruptArtifact.
    """
    if reference.endswith((".yaml", ".yml")):
        return last_report(load(Path(reference), resources=resources), reference)
    if RUN.fullmatch(reference) and not Path(reference).exists():
        return _of_run(reference, load_resources(resources))
    version = VERSION.fullmatch(reference.removeprefix(MODELS))
    if version and (version["alias"] or reference.startswith(MODELS)) and not Path(reference).exists():
        loaded = load_resources(resources)
        if version["alias"]:
            return report_of(version["name"], version["alias"], loaded)
        return report_of(version["model"], version["number"], loaded)
    return _in_folder(reference)


def last_report(run: Run, recipe: str) -> EvalReport:
    """The report of a recipe's last model on its final suite. `recipe` is its file, for the message of the error.

    Raises ValueError where something of it was not made yet.
    """
    stage, suite, resources = last_stage(run.recipe), run.recipe.final_suite, run.resources
    try:
        *_, last = walk(run, SEALED, NO_CONTEXT)
        data = _prepared(suite.mixture, suite_text(run.recipe, stage), resources, NO_CONTEXT)
        report = evaluated(suite, last.model, data, resources)
        return _there(report, f"the model after {stage!r} was not measured on {suite.name!r}")
    except _NotMade as error:
        raise ValueError(
            f"recipe {run.recipe.name!r} has no report yet: {error}; make it with `vila-ops evaluate {recipe} --stage "
            f"{stage} --final`"
        ) from error


class _NotMade(ValueError):
    """What a report needs is not in the store."""


def _there(made: T | None, problem: str) -> T:
    if made is None:
        raise _NotMade(problem)
    return made


def _assembled(model: Model, resources: Resources, _: RunContext) -> Pretrained:
    return _there(assembled(model, resources), "its untrained model was not assembled")


def _prepared(mixture: Mixture, text: TextFormat, resources: Resources, _: RunContext) -> Dataset:
    return _there(prepared(mixture, text, resources), f"mixture {mixture.name!r} was not prepared")


def _trained(
    stage: Stage, model: Model, data: Dataset, init: Weights, resources: Resources, _: RunContext
) -> Checkpoint:
    return _there(trained(stage, model, data, init, resources), f"stage {stage.name!r} was not trained")


SEALED = Tasks(assemble=_assembled, prepare=_prepared, train_stage=_trained)
"""Tasks that return what is sealed and make nothing."""


def _of_run(run_id: str, resources: Resources) -> EvalReport:
    """The report that an MLflow run logged."""
    below = tracking.evaluations(resources, run_id)
    for report in sealed(EvalReport, store=resources.storage.store):
        if store.manifest_of(report)["execution"].get("mlflow_run") == run_id:
            return report
    if below:
        raise ValueError(
            f"run {run_id} is not of one evaluation; give one of those below it: "
            f"{', '.join(f'{one} ({name})' for one, name in below.items())}"
        )
    raise ValueError(
        f"run {run_id} is not of an evaluation, or its report is not in {resources.storage.store}; give the run of an "
        "evaluation, or other resources with -r"
    )


def _in_folder(uri: str) -> EvalReport:
    manifest = store.find_manifest(store.root_of(uri))
    if manifest is None:
        raise ValueError(
            f"{uri!r} is no report: give the folder that `vila-ops evaluate` prints, a recipe (.yaml), a version "
            f"(models:/NAME/VERSION or NAME@ALIAS), or the id of an MLflow run"
        )
    kind, _, _ = manifest["address"].partition("/")
    if kind != store.KINDS[EvalReport]:
        raise ValueError(f"{uri} is a {kind}, not a report; give the folder that `vila-ops evaluate` prints")
    return store.reference(EvalReport, store.root_of(uri), manifest)
