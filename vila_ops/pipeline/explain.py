"""Which tasks of a run will work and why, before it starts. Nothing is made; raw files are read as a run reads them.

A task works unless its address is sealed. What changed is told relative to the sealed artifact of the task that differs
in the fewest settings, the newest of several; a base model is compared with those that share a part with it. A task
that reads what is not made yet has no address; it is compared by its own settings.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, TypeVar

from vila_ops.artifacts import store
from vila_ops.artifacts.kinds import (
    Artifact,
    BenchmarkResult,
    Checkpoint,
    Dataset,
    EvalReport,
    Pretrained,
)
from vila_ops.artifacts.listing import manifests
from vila_ops.config import Config, Mixture, Model, OfficialSuite, Run, Suite, TextFormat
from vila_ops.config.base import differences
from vila_ops.config.run import BASE
from vila_ops.data.preprocess import prepare
from vila_ops.data.preprocess.changes import changed_files
from vila_ops.eval import evaluate
from vila_ops.eval.job import EvalJob
from vila_ops.model import assemble
from vila_ops.pipeline.stages import Weights, check_stage, last_stage, mixture_named, suite_text
from vila_ops.registry import alias_register
from vila_ops.registry.aliases import CHAMPION
from vila_ops.train import stage as training
from vila_ops.train.job import StageInputs

UNMADE = "unmade:"
"""How the digest of an artifact begins that this run would make first."""
LONGEST = 60
"""Characters of a value that are shown."""
Manifest = dict[str, Any]
A = TypeVar("A", bound=Artifact)


class Step(Config):
    """One task of a run."""

    task: str
    name: str
    status: Literal["sealed", "runs", "follows", "reconciles"]
    """`follows`: it has no change of its own, and works unless what it reads comes out as it was before."""
    why: tuple[str, ...]
    """What changed, a line each."""
    uri: str | None
    """The sealed artifact."""


def works(steps: Iterable[Step]) -> bool:
    """Whether a task will work on what is not sealed yet."""
    return any(step.status in ("runs", "follows") for step in steps)


def explain(run: Run) -> list[Step]:
    """The tasks of a run in their order. Raises ValueError where raw files are missing, and CorruptArtifact."""
    recipe, steps = run.recipe, Steps(run)
    held_out: dict[TextFormat, Dataset] = {}
    for stage, model in steps.walk():
        text = suite_text(recipe, stage)
        if text not in held_out:
            held_out[text] = steps.prepare(recipe.final_suite.mixture, text, "final_suite.mixture")
        steps.evaluate(recipe.stage_suite, "stage_suite", stage, model, held_out[text])
    steps.evaluate(recipe.final_suite, "final_suite", stage, model, held_out[text])
    if run.resources.tracking.uri is not None and recipe.stages:
        steps.rival_of(model)
        live = {"register": recipe.gate.model_name, "deploy": recipe.service.name}
        if run.resources.serve.started_by == "operator":
            del live["deploy"]
        for task, name in live.items():
            why = "it looks at what is live at every run, and changes only what differs"
            steps.listed.append(Step(task=task, name=name, status="reconciles", why=(why,), uri=None))
    return steps.listed


def explain_prepare(run: Run, mixture: str) -> list[Step]:
    """The task that prepares a mixture of the recipe, by its name."""
    steps = Steps(run)
    steps.prepare(*mixture_named(run.recipe, mixture), "mixture")
    return steps.listed


def explain_train(run: Run, stage: str) -> list[Step]:
    """The tasks that make the model after a stage, in their order."""
    steps = Steps(run)
    steps.model_after(stage)
    return steps.listed


def explain_evaluate(run: Run, stage: str, suite: Suite | OfficialSuite) -> list[Step]:
    """The tasks that measure the model after a stage on a suite of the recipe or an official one, in their order."""
    recipe, steps = run.recipe, Steps(run)
    own = {"final_suite": recipe.final_suite, "stage_suite": recipe.stage_suite}
    setting = next((name for name, one in own.items() if one is suite), suite.name)
    check_stage(recipe, stage, (BASE, *recipe.stages))
    data = None
    if isinstance(suite, Suite):
        data = steps.prepare(suite.mixture, suite_text(recipe, stage), f"{setting}.mixture")
    steps.evaluate(suite, setting, stage, steps.model_after(stage), data)
    return steps.listed


def explain_promotion(run: Run) -> list[Step]:
    """The tasks that make and measure the last stage's model and the champion that it meets, in their order."""
    steps = Steps(run)
    steps.candidate()
    return steps.listed


class Steps:
    """The steps so far, and what the store has of each kind."""

    def __init__(self, run: Run) -> None:
        self.listed: list[Step] = []
        self._run, self._store = run, run.resources.storage.store
        self._made: dict[str, Artifact] = {}

    def walk(self) -> Iterator[tuple[str, Weights]]:
        """The models from the first (`base`) to the last; the tasks of each are told when it is asked for."""
        recipe = self._run.recipe
        model: Weights = self.assemble(recipe.model)
        yield BASE, model
        for name, stage in recipe.stages.items():
            data = self.prepare(stage.mixture, recipe.text(name), f"stages.{name}.mixture")
            model = self.train(name, data, model)
            yield name, model

    def model_after(self, last: str) -> Weights:
        """The model after a stage, with every stage before it."""
        check_stage(self._run.recipe, last, (BASE, *self._run.recipe.stages))
        return next(model for stage, model in self.walk() if stage == last)

    def candidate(self) -> Weights:
        """The last stage's model on the final suite, and the champion that the gate compares it with."""
        recipe, last = self._run.recipe, last_stage(self._run.recipe)
        suite, model = recipe.final_suite, self.model_after(last)
        data = self.prepare(suite.mixture, suite_text(recipe, last), "final_suite.mixture")
        self.evaluate(suite, "final_suite", last, model, data)
        self.rival_of(model)
        return model

    def rival_of(self, model: Weights) -> None:
        """The champion by the store's register, on the final suite, if it is another model.

        Raises ValueError for a champion that does not say how it reads text and images.
        """
        suite, name = self._run.recipe.final_suite, self._run.recipe.gate.model_name
        rival = alias_register.read(name, store=self._store).model_version(name, CHAMPION)
        if rival is not None and rival.checkpoint.digest != model.digest:
            text = training.trained_model(rival.checkpoint).text(max_tokens=suite.max_tokens)
            data = self.prepare(suite.mixture, text, "final_suite.mixture")
            self.evaluate(suite, "final_suite", f"{CHAMPION} {rival.version}", rival.checkpoint, data)

    def assemble(self, model: Model) -> Pretrained:
        """The untrained model."""
        at = assemble.address_of(model)
        if done := store.find(Pretrained, at, store=self._store):
            return self._sealed("assemble", BASE, done)
        alike = [one for one in self._pretrained if _are_alike(one[1]["recipe"], _as_json(at.recipe))]
        new = ("no base model with its tower or its language model is sealed",)
        self._add("assemble", BASE, self._why(at, alike, {"": "model."}) if alike else new, follows=False)
        return Pretrained(uri="", digest=unmade(at))

    def prepare(self, mixture: Mixture, text: TextFormat, setting: str) -> Dataset:
        """The data of a mixture; told once for each dataset."""
        at = prepare.address_of(mixture, text, self._run.resources)
        if at.key in self._made:
            known = self._made[at.key]
            assert isinstance(known, Dataset)
            return known
        done = prepare.prepared_at(at, mixture, self._run.resources)
        if done is not None:
            self._sealed("prepare", mixture.name, done)
        else:
            same = [one for one in self._datasets if one[1]["recipe"]["mixture"]["name"] == mixture.name]
            nearest = _nearest(at, same)
            raw = () if nearest is None else tuple(changed_files(at, mixture, *nearest, self._run.resources))
            places = {"mixture.": f"{setting}.", "text.": "how the model reads text and images: ", "sources.": ""}
            self._add("prepare", mixture.name, raw + self._why(at, same, places), follows=False)
            done = Dataset(uri="", digest=unmade(at), num_samples=0, num_tokens=0)
        self._made[at.key] = done
        return done

    def train(self, stage: str, data: Dataset, init: Weights) -> Checkpoint:
        """The model after a stage."""
        recipe, resources = self._run.recipe, self._run.resources
        inputs = StageInputs(
            stage=recipe.stages[stage], model=recipe.model_of(stage), data=data, init=init, resources=resources
        )
        at = training.address_of(inputs)
        if done := store.find(Checkpoint, at, store=self._store):
            return self._sealed("train", stage, done)
        same = [one for one in self._checkpoints if one[1]["facts"]["stage"] == stage]
        places = {"stage.": f"stages.{stage}.", "projector": "model.projector"}
        self._add_reading("train", stage, at, same, {"data": data, "model": init}, places)
        return Checkpoint(uri="", digest=unmade(at), stage=stage, step=0)

    def evaluate(
        self, suite: Suite | OfficialSuite, setting: str, stage: str, model: Weights, data: Dataset | None
    ) -> None:
        """The report of a model on a suite: benchmark by benchmark."""
        job = evaluate.job_of(suite, model, data, self._run.resources)
        results = evaluate.results_of(job)
        name = f"{stage} on {suite.name}"
        missing = [one for one in suite.benchmarks if one not in results]
        if missing:
            self._add_benchmarks(name, job, missing, setting)
            return
        report = store.find(EvalReport, evaluate.address_of(job, results), store=self._store)
        if report is not None:
            self._sealed("evaluate", name, report)
            return
        self._add("evaluate", name, ("every benchmark is measured; the report is composed again",), follows=False)

    def _add_benchmarks(self, name: str, job: EvalJob, missing: Sequence[str], setting: str) -> None:
        reads: dict[str, Artifact] = {"model": job.model} if isinstance(job.model, Artifact) else {}
        reads |= {"held-out data": job.data} if job.data else {}
        whys: dict[str, list[str]] = {}
        own = False
        for one in missing:
            at = job.address(one)
            same = [r for r in self._results if r[1]["recipe"]["benchmark"]["kind"] == at.recipe["benchmark"]["kind"]]
            places = {"benchmark.": f"{setting}.benchmarks.{one}.", "inputs.settings.": f"{setting}."}
            why, changed = self._reading(at, same, reads, places)
            own |= changed
            for line in why:
                whys.setdefault(line, []).append(one)
        every = len(missing) == len(job.suite.benchmarks)
        told = tuple(
            line if every and len(names) == len(missing) else f"{', '.join(names)}: {line}"
            for line, names in whys.items()
        )
        self._add("evaluate", name, told, follows=not own)

    def _add_reading(
        self,
        task: str,
        name: str,
        at: store.Address,
        same: Sequence[tuple[str, Manifest]],
        reads: Mapping[str, Artifact],
        places: Mapping[str, str],
    ) -> None:
        why, own = self._reading(at, same, reads, places)
        self._add(task, name, why, follows=not own)

    def _reading(
        self,
        at: store.Address,
        same: Sequence[tuple[str, Manifest]],
        reads: Mapping[str, Artifact],
        places: Mapping[str, str],
    ) -> tuple[tuple[str, ...], bool]:
        """Why a task that reads artifacts works, and whether the reason is more than that they are made first."""
        first = [label for label, one in reads.items() if one.digest.startswith(UNMADE)]
        nearest = _nearest(at, same)
        if nearest is None:
            return ((*_made_first(first), "nothing of this name is sealed"), True)
        own = tuple(_settings(at, nearest[1], places))
        other = [
            f"its {label} is another one ({one.digest[:12]})"
            for label, one in reads.items()
            if label not in first and one.digest not in nearest[1]["parents"]
        ]
        if not (first or own or other):
            other = ["this version of vila-ops makes it in another way"]
        return ((*_made_first(first), *own, *other), bool(own or other))

    def _why(
        self, at: store.Address, same: Sequence[tuple[str, Manifest]], places: Mapping[str, str]
    ) -> tuple[str, ...]:
        """What changed for a task that reads no artifact."""
        nearest = _nearest(at, same)
        if nearest is None:
            return ("nothing of this name is sealed",)
        other = set(at.parents) != set(nearest[1]["parents"]) and at.kind == store.KINDS[Pretrained]
        return (*_settings(at, nearest[1], places), *(("a local folder of it has another content",) if other else ()))

    def _add(self, task: str, name: str, why: tuple[str, ...], *, follows: bool) -> None:
        told = why or ("this version of vila-ops makes it in another way",)
        self.listed.append(Step(task=task, name=name, status="follows" if follows else "runs", why=told, uri=None))

    def _sealed(self, task: str, name: str, done: A) -> A:
        self.listed.append(Step(task=task, name=name, status="sealed", why=(), uri=done.uri))
        return done

    @cached_property
    def _pretrained(self) -> list[tuple[str, Manifest]]:
        return list(manifests(Pretrained, store=self._store))

    @cached_property
    def _datasets(self) -> list[tuple[str, Manifest]]:
        return list(manifests(Dataset, store=self._store))

    @cached_property
    def _checkpoints(self) -> list[tuple[str, Manifest]]:
        return list(manifests(Checkpoint, store=self._store))

    @cached_property
    def _results(self) -> list[tuple[str, Manifest]]:
        return list(manifests(BenchmarkResult, store=self._store))


def _made_first(labels: Sequence[str]) -> Iterator[str]:
    if labels:
        yield f"its {' and its '.join(labels)} {'is' if len(labels) == 1 else 'are'} made first"


def unmade(at: store.Address) -> str:
    """What stands for the digest of an artifact that is not made yet."""
    return f"{UNMADE}{at.kind}/{at.key}"


def _are_alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two recipes of base models have a part in common; other base models have no more than their kind."""
    return any(one[part] == other[part] for part in ("vision_tower", "language_model"))


def _nearest(at: store.Address, same: Sequence[tuple[str, Manifest]]) -> tuple[str, Manifest] | None:
    """The artifact that differs from an address in the fewest settings, and then parents; the newest of several."""

    def far(one: tuple[str, Manifest]) -> tuple[int, int]:
        recipe, parents = one[1]["recipe"], one[1]["parents"]
        return len(list(differences(recipe, _as_json(at.recipe)))), len(set(at.parents) - set(parents))

    newest_first = sorted(same, key=lambda one: one[1]["execution"].get("sealed", ""), reverse=True)
    return min(newest_first, key=far, default=None)


def _settings(at: store.Address, manifest: Manifest, places: Mapping[str, str]) -> Iterator[str]:
    """Each setting in which an address differs from a sealed artifact, by its place in the recipe."""
    for key, before, now in differences(manifest["recipe"], _as_json(at.recipe)):
        if key.startswith("sources."):
            continue  # digests, which are told file by file
        if key.startswith("made_by."):
            yield f"this version of vila-ops makes {key.removeprefix('made_by.')} in another way"
            continue
        prefix = max((one for one in places if key.startswith(one)), key=len, default="")
        yield f"{places.get(prefix, '')}{key.removeprefix(prefix)}: {_short(before)} -> {_short(now)}"


def _as_json(recipe: Any) -> Any:
    return json.loads(json.dumps(recipe))


def _short(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
