"""The sealed artifacts of a store, by kind and by digest."""

from collections.abc import Iterator
from typing import Any, TypeVar

from vila_ops.artifacts.kinds import Artifact
from vila_ops.artifacts.store import KINDS, backend, find_manifest, reference, root_of

A = TypeVar("A", bound=Artifact)


def manifests(kind: type[Artifact], *, store: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Folder and manifest of each artifact of a kind, in the order of their addresses. Raises CorruptArtifact."""
    for place in folders(kind, store=store):
        if (manifest := find_manifest(place)) is not None:
            yield place, manifest


def folders(kind: type[Artifact], *, store: str) -> list[str]:
    """The folders of a kind, sealed or not, in the order of their addresses."""
    place = f"{root_of(store)}/{KINDS[kind]}"
    return [f"{place}/{key}" for key in sorted({one.name.partition("/")[0] for one in backend(place).entries(place)})]


def sealed(kind: type[A], *, store: str) -> Iterator[A]:
    """The artifacts of a kind, in the order of their addresses. Raises CorruptArtifact for a damaged manifest."""
    for uri, manifest in manifests(kind, store=store):
        yield reference(kind, uri, manifest)


def of_digest(kind: type[A], digest: str, *, store: str) -> A | None:
    """An artifact with this digest; None where the store has none. May read the manifests of the whole kind."""
    return next((one for one in sealed(kind, store=store) if one.digest == digest), None)
