"""Sealed artifacts copied from one store into another, with the same digests; files that several hold are one file."""

from typing import Any

from vila_ops.artifacts.attempts import attempt
from vila_ops.artifacts.backend import FileFacts
from vila_ops.artifacts.disk_faults import require
from vila_ops.artifacts.kinds import Artifact, Shard
from vila_ops.artifacts.listing import manifests
from vila_ops.artifacts.store import KINDS, Address, Linked, copy_files, find, seal

COPIED: tuple[type[Artifact], ...] = tuple(sorted(KINDS, key=lambda kind: kind is not Shard))
"""Every kind. Shards come first, since datasets hold their files."""


class Replicas:
    """Copies of artifacts in one store."""

    def __init__(self, store: str) -> None:
        self._store = store
        self._held: dict[str, Linked] = {}
        """An artifact that is there and the name of its file, by the file's sha256."""

    def copy(self, kind: type[Artifact], uri: str, manifest: dict[str, Any]) -> int | None:
        """Copy the sealed artifact of this manifest; returns the bytes that were written, None if it is there.

        Each byte is compared with its sha256. Raises ValueError where the store has another artifact at its address,
        CorruptArtifact for a damaged one, and DiskFault where the disk is full or fails.
        """
        name, _, key = manifest["address"].partition("/")
        at = Address(name, key, manifest["recipe"], tuple(manifest["parents"]))
        there, num_bytes = find(kind, at, store=self._store), None
        if there is None:
            files = manifest["files"]
            linked = {one: self._held[f["sha256"]] for one, f in files.items() if f["sha256"] in self._held}
            num_bytes = sum(f["size"] for one, f in files.items() if one not in linked)
            with attempt(at, store=self._store) as folder:
                require(folder, num_bytes)
                copied = copy_files(uri, manifest, folder, without=linked)
            known: dict[str, FileFacts | Linked] = {**copied, **linked}
            facts, execution = manifest["facts"], manifest["execution"]
            there = seal(kind, at, folder, facts=facts, execution=execution, known=known)
        if there.digest != manifest["digest"]:
            raise ValueError(
                f"{there.uri} holds digest {there.digest[:12]}..., and {uri} {manifest['digest'][:12]}...: two stores "
                f"made different results at this address; use another folder"
            )
        for one, f in manifest["files"].items():
            self._held.setdefault(f["sha256"], (there, one))
        return num_bytes


def all_manifests(store: str) -> list[tuple[type[Artifact], str, dict[str, Any]]]:
    """Kind, folder and manifest of each sealed artifact, in the order to copy them. Raises CorruptArtifact."""
    return [(kind, uri, manifest) for kind in COPIED for uri, manifest in manifests(kind, store=store)]
