"""Requests that a service kept, as prepared samples: those of a time, read as the champion reads text and images."""

from pathlib import Path

from vila_ops.artifacts.kinds import Dataset
from vila_ops.artifacts.store import backend, root_of
from vila_ops.config import Mixture, Resources, Service, TextFormat, fingerprint
from vila_ops.config.sources import Messages
from vila_ops.data.preprocess.prepare import prepare
from vila_ops.retrain.feedback import RECORDS

NAME = "traffic"
"""Of the mixture and of its source."""


def place_of(service: Service, resources: Resources) -> str | None:
    """Where a service keeps requests; None where it keeps none."""
    kept = resources.serve.samples
    if kept is None:
        return None
    return root_of(kept.place or f"{resources.storage.store.rstrip('/')}/samples/{service.name}")


def traffic_between(
    place: str, since: float, until: float, *, text: TextFormat, resources: Resources
) -> Dataset | None:
    """The requests kept in [since, until), in seconds since 1970 by the store's clock; None where there are none.

    They are copied into the scratch space under a name of their content, as the place removes old ones.
    """
    names = [entry.name for entry in backend(place).entries(f"{place}/{RECORDS}") if since <= entry.changed < until]
    kept = sorted(name for name in names if name.endswith(".json"))
    if not kept:
        return None
    folder = resources.storage.scratch() / "retrain" / NAME / fingerprint(kept)[:32]
    folder.mkdir(parents=True, exist_ok=True)
    for name in kept:
        _copy(f"{place}/{RECORDS}/{name}", folder / name)
    source = Messages(path=str(folder), licence="unstated", ignore=("model", "at"))
    mixture = Mixture(name=NAME, sources={NAME: source}, max_bad_share=1.0)
    return prepare(mixture, text, resources)


def _copy(place: str, target: Path) -> None:
    """Copy a file that never changes; one that was removed meanwhile is left out."""
    if not target.exists() and (data := backend(place).read(place)) is not None:
        draft = target.with_suffix(".part")
        draft.write_bytes(data)
        draft.replace(target)
