"""How fast stages trained, by which others are forecast on hardware that the planner does not know, such as a CPU."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from vila_ops.artifacts import store
from vila_ops.artifacts.kinds import Checkpoint
from vila_ops.artifacts.listing import manifests
from vila_ops.config import Model, Stage
from vila_ops.config.base import differences
from vila_ops.train.stage import trained_model

NO_CHANGE = {"seed", "save_every", "validate_every", "validation_rows"}
"""Settings of a stage that make a step neither faster nor slower."""


class Timed(NamedTuple):
    """A stage that was timed."""

    settings: Mapping[str, Any]
    """Of the stage and its model, as by `speed_settings`."""
    seconds: float
    """For a token position, padding included."""


def pace_of(stage: Stage, model: Model, timed: Sequence[Timed]) -> float | None:
    """Seconds of a position in the stage of the same tower and language model with the fewest other settings.

    Of equally alike ones the first counts. None without such a stage.
    """
    wanted = speed_settings(stage.model_dump(mode="json"), model)
    own = [one for one in timed if _parts(one.settings) == _parts(wanted)]
    if not own:
        return None
    return min(own, key=lambda one: len(list(differences(one.settings, wanted)))).seconds


def sealed_timings(uri: str) -> list[Timed]:
    """Those of the sealed stages of a store, the newest first."""
    return [timed for _, timed in sorted(_sealed(uri), key=lambda one: one[0], reverse=True)]


def _sealed(uri: str) -> Iterator[tuple[str, Timed]]:
    for at, manifest in manifests(Checkpoint, store=uri):
        execution = manifest["execution"]
        if execution.get("model") is not None and (made := timed_positions(manifest)) > 0:
            with suppress(ValidationError):  # a model of another version has no pace to compare with
                model = trained_model(store.reference(Checkpoint, at, manifest))
                settings = speed_settings(manifest["recipe"]["stage"], model)
                yield execution.get("sealed", ""), Timed(settings, float(execution["seconds"]) / made)


def speed_settings(stage: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """What the time of a step may depend on, without places of one machine. `stage` has the settings of a stage."""
    own = {key: value for key, value in stage.items() if key not in {"mixture", *NO_CHANGE}}
    settings: dict[str, Any] = _without_places({"stage": own, "model": model.model_dump(mode="json")})
    return settings


def _without_places(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    absolute = {key for key, one in value.items() if isinstance(one, str) and Path(one).is_absolute()}
    return {key: _without_places(one) for key, one in value.items() if key not in absolute}


def _parts(settings: Mapping[str, Any]) -> tuple[Any, Any]:
    return settings["model"]["vision_tower"], settings["model"]["language_model"]


def positions_of(stage: Mapping[str, Any], steps: int) -> int:
    """Token positions of steps of a stage, by its settings."""
    return steps * int(stage["global_batch_size"]) * int(stage["sequence_length"])


def timed_positions(manifest: Mapping[str, Any]) -> int:
    """Token positions of a sealed stage that its last attempt trained on, in the time that its manifest has."""
    workers = manifest["execution"]["workers"]
    first = workers[0].get("first_step", 0) if workers else 0
    return positions_of(manifest["recipe"]["stage"], manifest["facts"]["step"] - first)
