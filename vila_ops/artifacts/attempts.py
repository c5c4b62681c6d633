"""Attempts at an address: one that fails leaves nothing, and what killed processes left is listed and removed."""

import logging
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

from vila_ops.artifacts.backend import AT_ONCE, GRACE_SECONDS, Entry
from vila_ops.artifacts.copies import SCHEME, copy_of, uri_of
from vila_ops.artifacts.disk_faults import faults_named, require
from vila_ops.artifacts.kinds import Artifact
from vila_ops.artifacts.leases import Lease
from vila_ops.artifacts.store import (
    ATTEMPT,
    KINDS,
    MANIFEST,
    Address,
    backend,
    begin,
    copy_files,
    find,
    find_manifest,
    manifest_of,
    probe,
    root_of,
    seal,
)
from vila_ops.errors import CorruptArtifact, VilaError

DRAFT = re.compile(r"\..+-[0-9a-f]{12}")
"""Hidden names: of a file before it is linked, and of a folder while it is removed."""
log = logging.getLogger(__name__)
A = TypeVar("A", bound=Artifact)


class Unsealed(NamedTuple):
    """The files of an attempt that no manifest names, or a draft."""

    place: str
    num_bytes: int
    changed: float
    """Time of the last change, in seconds since 1970."""


@contextmanager
def attempt(at: Address, *, store: str, lease: Lease | None = None) -> Iterator[Path]:
    """A new local folder to fill in the block and to `seal` after it; it is removed if the block fails.

    Abandoned attempts at the address are removed first. Raises DiskFault where the disk is full or fails, LeaseLost
    where another process holds the lease at the end of the block, and what `store.probe` raises.
    """
    probe(store)
    _remove_abandoned(at.uri(store))
    folder = begin(at, store=store)
    try:
        with faults_named(folder):
            yield folder
        if lease is not None:
            lease.renew()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        for note in folder.parent.glob(f"{folder.name}-*"):  # its workers write beside it
            note.unlink(missing_ok=True)
        raise


def keep(artifact: A, at: Address, *, store: str) -> A:
    """What the store has at an address, or else a copy of the artifact, which lies elsewhere, such as in DVC's output.

    Others may replace that one while it is read; nothing removes what is sealed in the store.
    """
    if done := find(type(artifact), at, store=store):
        return done
    log.info("%s is copied into %s, since it may be replaced while it is read", artifact.uri, store)
    manifest = manifest_of(artifact)
    with attempt(at, store=store) as folder:
        require(folder, sum(facts["size"] for facts in manifest["files"].values()))
        files = copy_files(artifact.uri, manifest, folder)
    return seal(type(artifact), at, folder, facts=manifest["facts"], execution=manifest["execution"], known=files)


def unsealed(store: str) -> list[Unsealed]:
    """The attempts and drafts in a store that no manifest names; on S3 also those in the copies on this machine.

    Raises CorruptArtifact for a damaged manifest on S3, which may name what is in another artifact's folder.
    """
    root = root_of(store)
    listed = [one for kind in KINDS.values() for here in _places(f"{root}/{kind}") for one in _of_kind(here)]
    return _not_linked(listed, root)


def _of_kind(place: str) -> Iterator[Unsealed]:
    by_key: dict[str, list[Entry]] = defaultdict(list)
    for entry in backend(place).entries(place):
        key, _, name = entry.name.partition("/")
        if name:
            by_key[key].append(entry._replace(name=name))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for of_address in pool.map(lambda key: _of_address(f"{place}/{key}", by_key[key]), sorted(by_key)):
            yield from of_address


def _remove_abandoned(uri: str) -> None:
    """Remove the attempts at an address that nobody works on. An error costs a warning: they are only in the way."""
    try:
        listed = [one for here in _places(uri) for one in _of_address(here, backend(here).entries(here))]
        old = [one for one in listed if time.time() - one.changed > GRACE_SECONDS]
        for one in _not_linked(old, uri.rsplit("/", 2)[0]):
            backend(one.place).remove(one.place)
            log.info("%s (%d bytes) was removed: an attempt that was killed left it", one.place, one.num_bytes)
    except (OSError, VilaError) as error:
        log.warning("what killed attempts left at %s was not removed: %s", uri, error)


def _places(place: str) -> tuple[str, ...]:
    """A place of a store; on S3 also that of its copies on this machine, where attempts are written."""
    return (place, str(copy_of(place))) if place.startswith(SCHEME) else (place,)


def _of_address(here: str, entries: Iterable[Entry]) -> list[Unsealed]:
    """What no manifest names among the entries at an address, or at the copy of one on this machine."""
    sizes: dict[str, int] = {}
    changed: dict[str, float] = {}
    for entry in entries:
        name = entry.name.partition("/")[0]
        sizes[name] = sizes.get(name, 0) + entry.size
        changed[name] = max(changed.get(name, 0.0), entry.changed)
    names = [name for name in sizes if name.startswith(ATTEMPT) or DRAFT.fullmatch(name)]
    if len(names) == (MANIFEST in sizes):  # the usual case: a manifest and what it names
        return []
    try:
        manifest = find_manifest(uri_of(Path(here)) or here)
    except CorruptArtifact:  # nobody knows which attempt was sealed
        return []
    sealed = None if manifest is None else manifest["data"]
    return [Unsealed(f"{here}/{name}", sizes[name], changed[name]) for name in names if name != sealed]


def _not_linked(listed: list[Unsealed], root: str) -> list[Unsealed]:
    """Without what the manifest of another artifact points to, which is possible on S3 alone."""
    if not any(one.place.startswith(SCHEME) for one in listed):
        return listed
    manifests = [
        f"{root}/{kind}/{entry.name.removesuffix(f'/{MANIFEST}')}"
        for kind in KINDS.values()
        for entry in backend(root).entries(f"{root}/{kind}")
        if entry.name.endswith(f"/{MANIFEST}") and entry.name.count("/") == 1
    ]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        loaded = [manifest for manifest in pool.map(find_manifest, manifests) if manifest is not None]
    linked = {f"{root}/{facts['at']}" for one in loaded for facts in one["files"].values() if "at" in facts}
    return [one for one in listed if not any(place.startswith(f"{one.place}/") for place in linked)]
