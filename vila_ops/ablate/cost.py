"""What a grid would take before it runs: stages that are sealed or shared, and tokens, hours and money of the rest.

A stage that several cells have in common counts with the first of them. Hours are the planner's where the resources
name an accelerator. Without one they are those of the most alike sealed stage of the same tower and language model,
position by position. Preparation and evaluations are not counted.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import ValidationError

from vila_ops.ablate.cells import CellRun
from vila_ops.artifacts import store
from vila_ops.artifacts.kinds import Checkpoint, Dataset, Pretrained
from vila_ops.artifacts.listing import manifests
from vila_ops.config import Config, Mixture, Model, Resources, Stage, TextFormat, fingerprint
from vila_ops.config.base import differences
from vila_ops.config.lengths import Lengths
from vila_ops.data.preprocess import prepare
from vila_ops.model import assemble
from vila_ops.pipeline.explain import UNMADE
from vila_ops.pipeline.stages import Weights
from vila_ops.plan.plan import StagePlan, plan_run
from vila_ops.train import stage as training
from vila_ops.train.job import StageInputs

NO_CHANGE = {"seed", "save_every", "validate_every", "validation_rows"}
"""Settings of a stage that make a step neither faster nor slower."""


class CellCost(Config):
    """What one cell with one seed would take."""

    cell: str
    seed: int
    sealed: int
    """Stages that are sealed."""
    shared: int
    """Stages that another cell makes before this one."""
    runs: tuple[str, ...]
    """Stages that would train."""
    tokens: float | None
    """Of the stages that would train, image tokens included and padding left out. None: their lengths are not known."""
    hours: float | None
    money: float | None
    """None without a price in the resources."""


class GridCost(Config):
    """What a grid would take."""

    cells: tuple[CellCost, ...]
    tokens: float | None
    hours: float | None
    money: float | None
    measured: bool
    """Whether hours are those of sealed stages, not of the planner."""
    unknown: str | None
    """Why numbers are missing."""


@dataclass(frozen=True)
class StageAt:
    """A stage of a cell and its place in the store, sealed or not."""

    stage: Stage
    model: Model
    at: store.Address
    done: Checkpoint | None


def stages_of(one: CellRun) -> Iterator[StageAt]:
    """The stages of a cell in order. Nothing is made, and raw data need not be on this machine."""
    recipe, resources = one.run.recipe, one.run.resources
    model: Weights = assemble.assembled(recipe.model, resources) or Pretrained(
        uri="", digest=_unmade(assemble.address_of(recipe.model))
    )
    for name in one.stages():
        stage = recipe.stages[name]
        data = _data(stage.mixture, recipe.text(name), resources)
        shape = recipe.model_of(name)
        inputs = StageInputs(stage=stage, model=shape, data=data, init=model, resources=resources)
        at = training.address_of(inputs)
        done = store.find(Checkpoint, at, store=resources.storage.store)
        model = done or Checkpoint(uri="", digest=_unmade(at), stage=name, step=0)
        yield StageAt(stage, shape, at, done)


def _data(mixture: Mixture, text: TextFormat, resources: Resources) -> Dataset:
    """The prepared mixture, or a reference with a digest that stands for it."""
    try:
        if done := prepare.prepared(mixture, text, resources):
            return done
        digest = _unmade(prepare.address_of(mixture, text, resources))
    except (ValueError, OSError):  # raw data is not on this machine
        digest = UNMADE + fingerprint([mixture.model_dump(mode="json"), text.model_dump(mode="json")])
    return Dataset(uri="", digest=digest, num_samples=0, num_tokens=0)


def _unmade(at: store.Address) -> str:
    return f"{UNMADE}{at.kind}/{at.key}"


def cost_of_grid(runs: Sequence[CellRun], lengths: Lengths | None = None) -> GridCost:
    """What the runs of a grid would take, with declared lengths of samples or those of prepared mixtures."""
    plans: dict[str, dict[str, StagePlan]] = {}
    unknown: str | None = None
    for one in runs:
        if one.cell not in plans:  # seeds change no length
            try:
                plans[one.cell] = {plan.stage: plan for plan in plan_run(one.run, lengths).stages}
            except ValueError as error:
                plans[one.cell], unknown = {}, str(error)
    pace, seen, cells = _MeasuredPace(runs[0].run.resources), set[str](), list[CellCost]()
    for one in runs:
        every = list(stages_of(one))
        new = [part for part in every if part.done is None and part.at.key not in seen]
        seen |= {part.at.key for part in every}
        planned = plans[one.cell]
        cells.append(
            CellCost(
                cell=one.cell,
                seed=one.seed,
                sealed=sum(part.done is not None for part in every),
                shared=sum(part.done is None for part in every) - len(new),
                runs=tuple(part.stage.name for part in new),
                tokens=_sum([planned[p.stage.name].tokens if planned else None for p in new]),
                hours=_sum([_hours(p, planned.get(p.stage.name), pace) for p in new]),
                money=_sum([planned[p.stage.name].cost if planned else None for p in new]),
            )
        )
    return GridCost(
        cells=tuple(cells),
        tokens=_sum([one.tokens for one in cells]),
        hours=_sum([one.hours for one in cells]),
        money=_sum([one.money for one in cells]),
        measured=runs[0].run.resources.train.accelerator is None,
        unknown=unknown,
    )


def _hours(part: StageAt, planned: StagePlan | None, pace: "_MeasuredPace") -> float | None:
    if planned is not None and planned.hours is not None:
        return planned.hours
    steps = planned.steps if planned else part.stage.num_steps
    seconds = pace.seconds(part.stage, part.model)
    return None if steps is None or seconds is None else seconds * _positions(part.stage.model_dump(), steps) / 3600


def _positions(stage: dict[str, Any], steps: int) -> int:
    return steps * int(stage["global_batch_size"]) * int(stage["sequence_length"])


class _MeasuredPace:
    """Seconds that the sealed stages of a store took for a position."""

    def __init__(self, resources: Resources) -> None:
        self._store, self._is_cpu = resources.storage.store, resources.train.accelerator is None

    def seconds(self, stage: Stage, model: Model) -> float | None:
        """Those of the stage of the same tower and language model with the fewest other settings, the newest of them.

        None without such a stage, or for a GPU.
        """
        parts = model.vision_tower, model.language_model
        own = [one for one in self._sealed if (one[1].vision_tower, one[1].language_model) == parts]
        if not self._is_cpu or not own:
            return None
        wanted = stage.model_dump(mode="json", exclude={"mixture", *NO_CHANGE}), model.model_dump(mode="json")

        def far(one: tuple[dict[str, Any], Model]) -> int:
            settings = {key: value for key, value in one[0]["recipe"]["stage"].items() if key not in NO_CHANGE}
            found = settings, one[1].model_dump(mode="json")
            return sum(len(list(differences(*pair))) for pair in zip(found, wanted, strict=True))

        manifest, _ = min(own, key=far)
        positions = _positions(manifest["recipe"]["stage"], _made(manifest))
        return float(manifest["execution"]["seconds"]) / positions

    @cached_property
    def _sealed(self) -> list[tuple[dict[str, Any], Model]]:
        """The manifest of each sealed stage with its model's settings, where it has them; the newest first."""
        listed = []
        for uri, manifest in manifests(Checkpoint, store=self._store):
            if manifest["execution"].get("model") is not None and _made(manifest) > 0:
                with suppress(ValidationError):  # a model of another version has no pace to compare with
                    listed.append((manifest, training.trained_model(store.reference(Checkpoint, uri, manifest))))
        return sorted(listed, key=lambda one: one[0]["execution"].get("sealed", ""), reverse=True)


def _made(manifest: dict[str, Any]) -> int:
    """Steps of a sealed stage that its last attempt made, in the time that its manifest has."""
    workers = manifest["execution"]["workers"]
    return int(manifest["facts"]["step"] - (workers[0].get("first_step", 0) if workers else 0))


def _sum(values: Sequence[float | None]) -> float | None:
    """The sum; None where a value is not known. Nothing to run is 0."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
