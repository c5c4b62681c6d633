"""Requests that a service kept, as prepared samples: those of a time, read as the champion reads text and images."""

from collections.abc import Sequence
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


def kept_requests(place: str) -> dict[str, float]:
    """The names of the requests that a service keeps, with their times, in seconds since 1970 by the store's clock."""
    listed = backend(place).entries(f"{place}/{RECORDS}")
    return {entry.name: entry.changed for entry in sorted(listed) if entry.name.endswith(".json")}


def traffic(place: str, kept: Sequence[str], *, text: TextFormat, resources: Resources) -> Dataset:
    """Kept requests by their names, as a dataset.

    They are copied into the scratch space under a name of their content, as the place removes old ones.
    """
    folder = resources.storage.scratch() / "retrain" / NAME / fingerprint(list(kept))[:32]
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
