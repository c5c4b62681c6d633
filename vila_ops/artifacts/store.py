"""Ask, work, seal last: content-addressed folders with a manifest that is written once, on disk or on S3.

    STORE/<kind>/<key>/manifest.json       sealed: one create-only write, link(2) or If-None-Match
    STORE/<kind>/<key>/<attempt>/...       the files; an attempt without a manifest was never finished

STORE is a folder or `s3://bucket/prefix`. The first seal of an address wins; a later `seal` returns the winner's
artifact.
"""

import hashlib
import json
import logging
import secrets
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from vila_ops.artifacts import disk, output
from vila_ops.artifacts.backend import AT_ONCE, Backend, FileFacts, way_out
from vila_ops.artifacts.copies import uri_of
from vila_ops.artifacts.disk_faults import FULL, faults_named
from vila_ops.artifacts.kinds import (
    Answers,
    Artifact,
    BenchmarkFiles,
    BenchmarkResult,
    Checkpoint,
    Dataset,
    Decision,
    Demonstrations,
    EvalReport,
    ModelCard,
    Pretrained,
    RawScan,
    Shard,
    Survey,
)
from vila_ops.artifacts.store_format import FORMAT, check_format, refuse_marked, refuse_other
from vila_ops.config import fingerprint
from vila_ops.errors import CorruptArtifact, DamagedFile, DiskFault, VilaError

THROUGHPUT_BYTES = 32 * 2**20
MANIFEST = "manifest.json"
ATTEMPT = "attempt-"
"""How the name of an attempt's folder, and of each file beside it, begins."""
EXPORTED = "files"
"""Folder of the files of an export; no attempt has this name."""
KINDS: dict[type[Artifact], str] = {
    Dataset: "dataset",
    Shard: "shard",
    Survey: "survey",
    RawScan: "raw_scan",
    Pretrained: "pretrained",
    Checkpoint: "checkpoint",
    BenchmarkFiles: "benchmark",
    Demonstrations: "demonstrations",
    Answers: "answers",
    BenchmarkResult: "score",
    EvalReport: "report",
    ModelCard: "model_card",
    Decision: "decision",
}
WHOLE: set[bytes] = set()
"""SHA-256 of each text that this process found to be a whole manifest: writing one again takes longer than reading."""
Linked = tuple[Artifact, str]
"""A sealed artifact and the name of one of its files."""
A = TypeVar("A", bound=Artifact)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Address:
    """A content address: kind + hash(task revision, recipe part, parents' digests)."""

    kind: str
    key: str
    recipe: Any
    """The recipe part, as JSON values."""
    parents: tuple[str, ...]
    """Digests of the artifacts that it is made from."""

    def uri(self, store: str) -> str:
        """The folder of this address in a store."""
        return f"{root_of(store)}/{self.kind}/{self.key}"


def address(kind: type[Artifact], *, revision: int, recipe: Any, parents: tuple[str, ...]) -> Address:
    """The address of a result: the task's revision, its part of the recipe (JSON values), the parents' digests."""
    name = KINDS[kind]
    question = {"kind": name, "revision": revision, "recipe": recipe, "parents": parents}
    return Address(name, fingerprint(question)[:32], recipe, parents)


def root_of(store: str) -> str:
    """A store as a string with one meaning in every process: an absolute folder, or `s3://bucket/prefix`."""
    return store.rstrip("/") if "://" in store else str(Path(store).resolve())


def backend(uri: str) -> Backend:
    """The module that reads and writes at a place."""
    match uri.partition("://"):
        case (_, "", ""):
            return disk
        case ("s3", _, _):
            from vila_ops.artifacts import s3  # heavy: boto3

            return s3
        case (scheme, _, _):
            raise ValueError(f"{uri}: {scheme} is not a kind of store; a store is a folder or s3://BUCKET/PREFIX")


def find(kind: type[A], at: Address, *, store: str) -> A | None:
    """The sealed artifact at an address of a store, or None.

    Checks that every file exists with its size; bytes are compared when they are read.
    """
    return find_in(kind, at, at.uri(store))


def find_in(kind: type[A], at: Address, uri: str) -> A | None:
    """The sealed artifact in a folder, such as an export, as by `find`; None where it holds none of this address."""
    manifest = find_manifest(uri)
    if manifest is None or manifest["address"] != f"{at.kind}/{at.key}":
        return None
    _check_sizes(uri, manifest)
    return reference(kind, uri, manifest)


def begin(at: Address, *, store: str) -> Path:
    """A new local folder for an attempt until `seal`; for S3 it is in the cache. Raises what `probe` raises."""
    probe(store)
    uri = f"{at.uri(store)}/{ATTEMPT}{secrets.token_hex(6)}"
    return backend(uri).begin(uri)


def seal(
    kind: type[A],
    at: Address,
    attempt: Path,
    *,
    facts: dict[str, Any],
    execution: dict[str, Any],
    known: Mapping[str, FileFacts | Linked] | None = None,
) -> A:
    """Publish an attempt: hash every file, make it durable, then write one create-only manifest.

    `facts` are the fields of the artifact reference and part of the digest; `execution` (times, machine, versions) is
    not. `known` names files that need no hashing: by their facts, or as a file of another artifact of the same store.
    A file of another artifact is compared, not copied: on disk it becomes a hard link, on S3 the manifest points to it.
    Returns the artifact at the address, which is another attempt's if that one was sealed first. Raises
    CorruptArtifact where a file of another artifact is damaged.
    """
    place = _place_of(attempt)
    uri, _, data = place.rpartition("/")
    with _discarded_on_failure(attempt, place):
        backend(uri).probe(store_of(uri))
        output.use_umask(attempt)
        files = _files(attempt, uri, known or {})
        manifest = {
            "format": FORMAT,
            "address": f"{at.kind}/{at.key}",
            "digest": _digest(at.kind, files, facts),
            "data": data,
            "files": files,
            "parents": at.parents,
            "facts": facts,
            "recipe": at.recipe,
            "execution": execution,
        }
        backend(uri).publish(attempt, place)
    if not _write_manifest(manifest, attempt, place):
        log.warning("%s was sealed by another attempt first; this attempt is dropped", uri)
        backend(uri).discard(attempt, place)
    return reference(kind, uri, read_manifest(uri))


def verify(artifact: Artifact) -> None:
    """Read every byte of an artifact in its store. Raises CorruptArtifact that names the first damaged file."""
    sealed = verify_folder(artifact.uri)
    if sealed != artifact.digest:
        raise CorruptArtifact(f"{artifact.uri} holds digest {sealed}, not {artifact.digest}")


def verify_folder(uri: str) -> str:
    """Read every byte of a sealed folder and return its digest. Raises CorruptArtifact where something differs."""
    uri = root_of(uri)  # its neighbours in the store may hold the same file
    manifest = read_manifest(uri)
    _check_sizes(uri, manifest)
    places = list(_places(uri, manifest).values())
    with _naming(uri), ThreadPoolExecutor(AT_ONCE) as pool:
        digests = list(pool.map(lambda one: backend(uri).digest(*one), places))
    for (place, expected), actual in zip(places, digests, strict=True):
        if actual != expected["sha256"]:
            raise _damaged(uri, place, f"has sha256 {actual[:12]}..., sealed as {expected['sha256'][:12]}...")
    stated = _digest(manifest["address"].split("/")[0], manifest["files"], manifest["facts"])
    if stated != manifest["digest"]:
        raise CorruptArtifact(f"{uri}/{MANIFEST} was changed after sealing; {way_out(uri)}")
    return stated


@dataclass(frozen=True)
class Opened:
    """The files of a sealed artifact. Each is compared with its sha256 once per process, at its first use."""

    uri: str
    data: str
    """Folder of the files that it does not link from other artifacts."""
    places: Mapping[str, tuple[str, FileFacts]]
    """Place and facts of each file, by name."""

    def file(self, name: str) -> Path:
        """One file on this machine; each machine downloads it from S3 once. Raises CorruptArtifact."""
        if name not in self.places:
            raise ValueError(f"{self.uri} has no file {name!r}; it has {sorted(self.places)[:5]}")
        with _naming(self.uri):
            return backend(self.uri).local(*self.places[name])

    def fetch(self) -> None:
        """Download the files that this machine lacks; each is compared at its first use. Raises CorruptArtifact."""
        with _naming(self.uri), ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(lambda one: backend(self.uri).fetch(*one), self.places.values()))

    def folder(self) -> Path:
        """A folder on this machine with all files. Raises CorruptArtifact."""
        with _naming(self.uri):
            return backend(self.uri).folder(self.data, self.places)


def opened(artifact: Artifact) -> Opened:
    """The files of a sealed artifact, not yet read. Raises CorruptArtifact where the folder holds another artifact."""
    manifest = manifest_of(artifact)
    return Opened(artifact.uri, f"{artifact.uri}/{manifest['data']}", _places(artifact.uri, manifest))


def content(artifact: Artifact) -> Path:
    """A folder on this machine with all files of a sealed artifact, each compared with its sha256 once per process."""
    return opened(artifact).folder()


def file(artifact: Artifact, name: str) -> Path:
    """One file of a sealed artifact on this machine, as by `content`, without the other files."""
    return opened(artifact).file(name)


def find_manifest(uri: str) -> dict[str, Any] | None:
    """The manifest of a sealed folder; None if there is none.

    Raises CorruptArtifact for a changed one, and OtherFormat in a store of another version.
    """
    place = f"{uri}/{MANIFEST}"
    data = backend(uri).read(place)
    if data is None:
        return None
    try:
        text = data.decode()
        manifest: dict[str, Any] = json.loads(text)
        written, names = manifest["format"], _names(manifest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        refuse_marked(backend(uri), store_of(uri))
        raise CorruptArtifact(f"{place} is not a manifest ({error}); {way_out(uri)}") from error
    if (known := hashlib.sha256(data).digest()) not in WHOLE:
        if text != manifest_text(manifest):
            refuse_marked(backend(uri), store_of(uri))
            raise CorruptArtifact(f"{place} was changed after sealing; {way_out(uri)}")
        WHOLE.add(known)
    refuse_other(place, written, reads=FORMAT)
    if outside := [name for name in names if name.startswith("/") or ".." in PurePosixPath(name).parts]:
        raise CorruptArtifact(f"{place} names {outside[0]!r}, which is outside of the folder; do not use this store")
    return manifest


def read_manifest(uri: str) -> dict[str, Any]:
    """The manifest of a sealed folder."""
    manifest = find_manifest(uri)
    if manifest is None:
        raise CorruptArtifact(f"{uri} has no {MANIFEST}: it was never finished, or it was removed; run again")
    return manifest


def manifest_of(artifact: Artifact) -> dict[str, Any]:
    """The manifest of a sealed artifact. Raises CorruptArtifact where its folder holds another one."""
    manifest = read_manifest(artifact.uri)
    if manifest["digest"] != artifact.digest:
        raise CorruptArtifact(
            f"{artifact.uri} holds digest {manifest['digest']}, not {artifact.digest}: it was replaced meanwhile; run "
            f"again"
        )
    return manifest


def copy_files(
    uri: str, manifest: dict[str, Any], target: Path, *, without: Collection[str] = ()
) -> dict[str, FileFacts]:
    """Copy the files of a sealed folder, `without` some, into a local folder; returns their facts by name."""
    copied = {name: one for name, one in _places(uri, manifest).items() if name not in without}
    for name, (place, facts) in copied.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        with _naming(uri):
            backend(uri).copy(place, facts, target / name)
    return {name: FileFacts(size=facts["size"], sha256=facts["sha256"]) for name, (_, facts) in copied.items()}


def probe(store: str) -> str:
    """Try, once per process, what sealing rests on in a store; returns a line that says what works.

    Raises UnsafeStore, StoreRefused, StoreUnreachable, OtherFormat for a store of another version, and OSError for a
    disk that failed.
    """
    root = root_of(store)
    told = backend(root).probe(root)
    check_format(backend(root), root)
    return told


def throughput(store: str) -> tuple[float, float]:
    """Bytes a second of writing a file into a store and of reading it back, after it is durable and not from memory.

    Raises StoreRefused, StoreUnreachable, and OSError for a disk that failed.
    """
    root, data = root_of(store), secrets.token_bytes(THROUGHPUT_BYTES)
    wrote, read = backend(root).timed(root, data)
    return len(data) / wrote, len(data) / read


def _place_of(attempt: Path) -> str:
    """The place in the store for which `begin` made a local folder."""
    return uri_of(attempt) or str(attempt)


@contextmanager
def _discarded_on_failure(attempt: Path, place: str) -> Iterator[None]:
    try:
        with faults_named(attempt):
            yield
    except BaseException:
        with suppress(OSError, VilaError):  # the first error is the one to tell
            backend(place).discard(attempt, place)
        raise


def _write_manifest(manifest: dict[str, Any], attempt: Path, place: str) -> bool:
    """Write the manifest of an attempt; False if its address has one.

    An error may hide that it was written, so it leaves the files to `vila-ops gc`, but on a full disk it was not.
    """
    try:
        return backend(place).create(f"{place.rpartition('/')[0]}/{MANIFEST}", manifest_text(manifest).encode())
    except DiskFault as error:
        if error.errno in FULL:
            backend(place).discard(attempt, place)
        raise


def _files(attempt: Path, uri: str, known: Mapping[str, FileFacts | Linked]) -> dict[str, FileFacts]:
    """The entries of a manifest: linked files, known files, and the other files of the attempt."""
    linked = {name: one for name, one in known.items() if isinstance(one, tuple)}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        entries = pool.map(lambda name: _link(attempt / name, uri, linked[name]), linked)
        files = dict(zip(linked, entries, strict=True))
    facts = {name: one for name, one in known.items() if not isinstance(one, tuple)}
    for path in sorted(path for path in attempt.rglob("*") if path.is_file()):
        name, size = path.relative_to(attempt).as_posix(), path.stat().st_size
        if name in files:
            continue
        if name in facts and facts[name]["size"] != size:
            raise ValueError(f"{path} has {size} bytes, but its known facts say {facts[name]['size']}")
        files[name] = FileFacts(size=size, sha256=facts[name]["sha256"] if name in facts else disk.known_sha256(path))
    if missing := sorted(set(facts) - set(files)):
        raise ValueError(f"{attempt} has no files {missing[:3]}, although their facts are given")
    return files


def _link(target: Path, uri: str, linked: Linked) -> FileFacts:
    """The manifest entry of another artifact's file, whose bytes are compared. On disk, hard-link it too."""
    artifact, name = linked
    if target.exists():
        raise ValueError(f"{target} is to be linked from {artifact.uri}, but the attempt has a file of that name")
    source = opened(artifact)
    place, facts = source.places[name]
    entry = FileFacts(size=facts["size"], sha256=facts["sha256"])
    if backend(uri) is disk:
        target.parent.mkdir(parents=True, exist_ok=True)
        disk.link(source.file(name), target)
    elif place.startswith(f"{store_of(uri)}/"):
        with _naming(artifact.uri):
            backend(uri).check(place, facts)
        entry["at"] = place.removeprefix(f"{store_of(uri)}/")
    else:
        raise ValueError(f"{place} cannot be linked into {uri}: it is in another store; seal a copy of it there first")
    return entry


def _names(manifest: dict[str, Any]) -> list[str]:
    """Every name in a manifest that becomes part of a path."""
    return [manifest["data"], *manifest["files"], *(f["at"] for f in manifest["files"].values() if "at" in f)]


def _places(uri: str, manifest: dict[str, Any]) -> dict[str, tuple[str, FileFacts]]:
    """Place and facts of each file, by name."""
    files: dict[str, FileFacts] = manifest["files"]
    own = f"{uri}/{manifest['data']}"
    return {name: (f"{store_of(uri)}/{f['at']}" if "at" in f else f"{own}/{name}", f) for name, f in files.items()}


def store_of(uri: str) -> str:
    """The store of an address's folder."""
    return uri.rsplit("/", 2)[0] if "://" in uri else str(Path(uri).parent.parent)


def reference(kind: type[A], uri: str, manifest: dict[str, Any]) -> A:
    """The artifact reference of a sealed folder with this manifest."""
    return kind.model_validate(
        {"uri": uri, "digest": manifest["digest"], "parents": manifest["parents"], **manifest["facts"]}
    )


def _digest(kind: str, files: Mapping[str, FileFacts], facts: dict[str, Any]) -> str:
    return fingerprint({"kind": kind, "files": {name: file["sha256"] for name, file in files.items()}, "facts": facts})


def manifest_text(manifest: dict[str, Any]) -> str:
    """The canonical text of a manifest with its own checksum; any other text is damage."""
    body = {key: value for key, value in manifest.items() if key != "checksum"}
    return json.dumps({**body, "checksum": fingerprint(body)}, indent=1, sort_keys=True)


def _check_sizes(uri: str, manifest: dict[str, Any]) -> None:
    places = list(_places(uri, manifest).values())
    for (place, expected), size in zip(places, backend(uri).sizes([place for place, _ in places]), strict=True):
        if size is None:
            raise _damaged(uri, place, "is missing")
        if size != expected["size"]:
            raise _damaged(uri, place, f"has {size} bytes, sealed with {expected['size']}")


@contextmanager
def _naming(uri: str) -> Iterator[None]:
    """Translate DamagedFile into CorruptArtifact, which names every sealed folder that holds the file."""
    try:
        yield
    except DamagedFile as error:
        raise _damaged(uri, error.place, error.fault) from error


def _damaged(uri: str, place: str, what: str) -> CorruptArtifact:
    """The error of a damaged file. Every sealed folder that holds it has to be moved away before a rebuild is sound."""
    if place.startswith(f"{uri}/{EXPORTED}/"):
        return CorruptArtifact(
            f"{place} {what}; where `dvc` replaced {uri} while it was read, run again; otherwise restore it (`dvc "
            f"checkout`), or move {uri} away and run again to rebuild it"
        )
    root = store_of(uri)
    others = [
        other
        for other in backend(uri).sharing(place, root, KINDS.values())
        if other != uri and _is_at_its_address(other)
    ]
    return CorruptArtifact(f"{place} {what}; {way_out(uri, *others)}")


def _is_at_its_address(uri: str) -> bool:
    """Whether a folder lies at its own address, which a renamed one does not."""
    try:
        manifest = find_manifest(uri)
    except CorruptArtifact:
        return True
    return manifest is not None and uri.endswith(f"/{manifest['address']}")
