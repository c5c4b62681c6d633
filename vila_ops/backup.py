"""Backups of a store, MLflow's and Prefect's databases, taken while they are used; restored into empty places alone.

    DIR/backup.json              says that the folder is one of ours
    DIR/store/<kind>/<key>/...   every sealed artifact once: a store by itself
    DIR/<snapshot>/              what changes: registers, keys, kept requests, databases, MLflow's artifacts
    DIR/<snapshot>/snapshot.json what this snapshot consists of, with digests

A snapshot is made under a hidden name and renamed when it is whole. A file that has not changed since the snapshot
before is a hard link to that one's. Leases, resume checkpoints and features are left out: a run makes them again.
"""

import fcntl
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from vila_ops import __version__, local
from vila_ops.artifacts import disk
from vila_ops.artifacts.attempts import DRAFT as UNFINISHED
from vila_ops.artifacts.backend import Entry
from vila_ops.artifacts.disk_faults import faults_named
from vila_ops.artifacts.output import check_folder
from vila_ops.artifacts.replicas import Replicas, all_manifests
from vila_ops.artifacts.store import backend, find_manifest, root_of, verify_folder
from vila_ops.artifacts.store_format import NAME as FORMAT_MARK
from vila_ops.artifacts.store_format import refuse_other
from vila_ops.config import Config, Resources
from vila_ops.config.base import fingerprint
from vila_ops.config.local import LocalServers
from vila_ops.errors import CorruptArtifact
from vila_ops.registry import alias_register

FORMAT = 1
MARKER, MANIFEST, STORE = "backup.json", "snapshot.json", "store"
KEYS = ("windows", "events", "samples")
"""Folders of a store whose files are written once: claims of windows and events, and kept requests."""
REGISTRY, MLFLOW, PREFECT, ARTIFACTS = "registry", "mlflow.db", "prefect.db", "mlflow-artifacts"
BESIDE = ("", "-wal", "-shm", "-journal")
"""Ends of the names of an sqlite database and of the files beside it, which sqlite would replay into a restored one."""
DRAFT = re.compile(r"\.\d{4}-\d\d-\d\dT\d{6}\.\d{6}Z-draft")
"""Hidden name of a snapshot that is being made."""
log = logging.getLogger(__name__)


class CopiedFile(Config):
    """A file of a snapshot."""

    size: int
    sha256: str
    changed: float
    """When the original had changed, in seconds since 1970. Equal size and time mean equal bytes."""


class BackupSnapshot(Config):
    """What a backup was at one time."""

    format: int
    name: str
    created: str
    version: str
    """Of vila-ops."""
    store: str
    artifacts: dict[str, str]
    """Digest of each sealed artifact by its address, KIND/KEY."""
    files: dict[str, CopiedFile]


class BackupResult(Config):
    """What a command has copied."""

    snapshot: str
    num_artifacts: int
    num_copied: int
    """Of the artifacts, those that were not there."""
    num_files: int
    num_bytes: int
    """That were written."""
    databases: tuple[str, ...]
    lacking: tuple[str, ...]
    """What a backup leaves out, such as a database in PostgreSQL, or artifacts that the backup has lost."""


def backup(resources: Resources, settings: LocalServers, folder: Path) -> BackupResult:
    """Add a snapshot to a folder, which is new, empty or of earlier backups.

    Raises ValueError for any other folder, OtherFormat for backups of another version, CorruptArtifact for a damaged
    artifact or database, and DiskFault.
    """
    root, databases = root_of(resources.storage.store), _databases(resources, settings)
    _check_target(folder, [Path(one) for one in (root,) if "://" not in one] + [local.root_of(settings)])
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder), faults_named(folder):
        before = _newest(folder)
        name = f"{datetime.now(UTC):%Y-%m-%dT%H%M%S.%fZ}"
        draft = _Draft(folder, name, before)
        # What names artifacts is copied before them: they were sealed before it named them.
        there = _sqlite(databases, settings)
        for one, path in there.items():
            draft.add(one, path.stat().st_size, -1.0, partial(local.copy_database, path))
        draft.add_folder(ARTIFACTS, databases[MLFLOW].with_name(ARTIFACTS))
        draft.add_registers(root)
        draft.add_keys(root)
        (folder / STORE).mkdir(exist_ok=True)
        replicas, artifacts, num_copied = Replicas(str(folder / STORE)), {}, 0
        for kind, uri, manifest in all_manifests(root):
            written = replicas.copy(kind, uri, manifest)
            artifacts[manifest["address"]] = manifest["digest"]
            num_copied += written is not None
            draft.num_bytes += written or 0
        snapshot = BackupSnapshot(
            format=FORMAT, name=name, created=datetime.now(UTC).isoformat(timespec="seconds"), version=__version__,
            store=root, artifacts=artifacts, files=draft.files,
        )  # fmt: skip
        draft.publish(snapshot)
    return BackupResult(
        snapshot=name, num_artifacts=len(artifacts), num_copied=num_copied, num_files=len(draft.files),
        num_bytes=draft.num_bytes, databases=tuple(there),
        lacking=_lacking(databases, there, resources, settings),
    )  # fmt: skip


def restore(folder: Path, resources: Resources, settings: LocalServers, *, at: str | None = None) -> BackupResult:
    """Put the newest snapshot of a backup, or the one named `at`, where store and databases are to be.

    Every byte is compared with its digest before anything is written. An artifact that was moved out of the backup is
    told, and left to the next run. After a kill the same call goes on; `up` waits for its end. Raises ValueError where
    something is in the way, OtherFormat, CorruptArtifact and DiskFault.
    """
    snapshot = _chosen(folder, at)
    root, databases = root_of(resources.storage.store), _databases(resources, settings)
    servers = local.root_of(settings)
    begun = servers / local.RESTORING
    goes_on = begun.is_file() and begun.read_text() == snapshot.name
    if not goes_on:
        _check_empty(root, databases)
    lacking = _verified(folder, snapshot)
    replicas, num_bytes = Replicas(root), 0
    with local.lock(servers):
        if not goes_on:  # `up` may have started servers meanwhile
            _refuse([str(path) for path in _places(databases) if path.exists()])
            begun.write_text(snapshot.name)
        for kind, uri, manifest in all_manifests(str((folder / STORE).resolve())):
            if snapshot.artifacts.get(manifest["address"]) == manifest["digest"]:
                num_bytes += replicas.copy(kind, uri, manifest) or 0
        for name, file in snapshot.files.items():
            _put_back(folder / snapshot.name / name, name, file, root, databases)
            num_bytes += file.size
        (servers / local.UPGRADED).unlink(missing_ok=True)  # it is of another database
        begun.unlink()
    num_artifacts = len(snapshot.artifacts) - len(lacking)
    return BackupResult(
        snapshot=snapshot.name, num_artifacts=num_artifacts, num_copied=num_artifacts, num_files=len(snapshot.files),
        num_bytes=num_bytes, databases=tuple(one for one in databases if one in snapshot.files), lacking=lacking,
    )  # fmt: skip


class _Draft:
    """A snapshot that is being made."""

    def __init__(self, folder: Path, name: str, before: BackupSnapshot | None) -> None:
        for left in folder.glob(".*"):
            if DRAFT.fullmatch(left.name):  # of a backup that was killed
                shutil.rmtree(left)
        self.files: dict[str, CopiedFile] = {}
        self.num_bytes = 0
        self._final, self._folder = folder / name, folder / f".{name}-draft"
        self._folder.mkdir()
        self._before = before.files if before else {}
        self._folder_before = folder / before.name if before else folder

    def add(self, name: str, size: int, changed: float, write: Callable[[Path], object]) -> None:
        """Add a file that `write` makes, unless its original is gone. One of the time and size as before is a link."""
        target, same, old = self._folder / name, self._before.get(name), self._folder_before / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if same and changed >= 0 and (same.size, same.changed) == (size, changed) and old.is_file():
            os.link(old, target)
            self.files[name] = same
            return
        with suppress(FileNotFoundError):
            write(target)
        if not target.exists():
            return
        written = target.stat().st_size
        self.files[name] = CopiedFile(size=written, sha256=disk.sha256(target), changed=changed)
        self.num_bytes += written

    def add_folder(self, name: str, source: Path) -> None:
        """Add the files of a local folder, if it exists; links in it are left out."""
        for path in sorted(source.rglob("*")):
            if path.is_file() and not path.is_symlink():
                stat = path.lstat()
                inside = f"{name}/{path.relative_to(source).as_posix()}"
                self.add(inside, stat.st_size, stat.st_mtime, partial(shutil.copyfile, path))

    def add_registers(self, root: str) -> None:
        """Add the newest version of each register of aliases."""
        for name in alias_register.names(store=root):
            place = alias_register.place_of(name, store=root)
            if (version := backend(root).load(place)) is not None:
                self.add(place.removeprefix(f"{root}/"), len(version.data), -1.0, partial(_write, version.data))

    def add_keys(self, root: str) -> None:
        """Add the files of a store that are written once."""
        for kind in KEYS:
            for entry in _files_below(f"{root}/{kind}"):
                name = f"{kind}/{entry.name}"
                self.add(name, entry.size, entry.changed, partial(_fetch, f"{root}/{name}"))

    def publish(self, snapshot: BackupSnapshot) -> None:
        """Make the snapshot visible, once all of it is on the disk."""
        body = snapshot.model_dump(mode="json")
        (self._folder / MANIFEST).write_text(json.dumps({**body, "checksum": fingerprint(body)}, indent=1))
        disk.publish(self._folder, str(self._folder))
        self._folder.rename(self._final)
        disk.sync(self._final.parent)


def _databases(resources: Resources, settings: LocalServers) -> dict[str, Path]:
    """The place of MLflow's database, a file of the resources or of this machine's servers, and of Prefect's."""
    uri, root = resources.tracking.uri or "", local.root_of(settings)
    file = uri.removeprefix("sqlite:///").partition("?")[0]
    mlflow = Path(file).absolute() if uri.startswith("sqlite:///") else root / MLFLOW
    return {MLFLOW: mlflow, PREFECT: root / "prefect" / PREFECT}


def _in_postgresql(settings: LocalServers) -> list[str]:
    """The databases that the servers have in PostgreSQL."""
    urls = {MLFLOW: settings.mlflow_database, PREFECT: settings.prefect_database}
    return [name for name, url in urls.items() if url is not None]


def _sqlite(databases: dict[str, Path], settings: LocalServers) -> dict[str, Path]:
    """The databases to copy. A file of the servers is out of date where they have that database in PostgreSQL."""
    root, elsewhere = local.root_of(settings), _in_postgresql(settings)
    old = {name for name in elsewhere if databases[name].is_relative_to(root)}
    return {name: path for name, path in databases.items() if name not in old and path.is_file()}


def _lacking(
    databases: dict[str, Path], there: dict[str, Path], resources: Resources, settings: LocalServers
) -> tuple[str, ...]:
    """What this backup leaves out and a restored machine would lack."""
    elsewhere = _in_postgresql(settings)
    missing = [name for name in databases if name not in there and name not in elsewhere]
    lacking = [f"{name}, which is not at {databases[name]}" for name in missing]
    lacking += [f"{name}, which is in PostgreSQL: pg_dump copies it" for name in elsewhere]
    samples, kept = resources.serve.samples, f"{root_of(resources.storage.store)}/samples/"
    if samples is not None and samples.place is not None and not f"{root_of(samples.place)}/".startswith(kept):
        lacking.append(f"kept requests at {samples.place}, which is outside of {kept}")
    return tuple(lacking)


def _files_below(place: str) -> list[Entry]:
    """The files below a place of a store, without those that are being written."""
    entries = [one for one in backend(place).entries(place) if not UNFINISHED.fullmatch(Path(one.name).name)]
    return [one for one in entries if "://" in place or Path(place, one.name).is_file()]


def _write(data: bytes, target: Path) -> None:
    target.write_bytes(data)


def _fetch(place: str, target: Path) -> None:
    """Copy a file of a store, if it is still there."""
    if (data := backend(place).read(place)) is not None:
        target.write_bytes(data)


def _check_target(folder: Path, apart: list[Path]) -> None:
    """Raise ValueError for a folder that holds other things than backups, or that is not apart from what is copied.

    Raises OtherFormat for backups of another format.
    """
    place, marker = folder.resolve(), folder / MARKER
    if marker.is_file():
        _check_marker(marker)
    else:
        check_folder(folder, apart=apart)
    for one in (path.resolve() for path in apart):
        if place.is_relative_to(one) or one.is_relative_to(place):
            raise ValueError(
                f"{folder} lies in or contains {one}, which is copied; name a folder outside of it, on another disk"
            )


def _check_marker(path: Path) -> None:
    """Raise ValueError for a file that is no mark of ours. One that a kill left empty is."""
    try:
        text = path.read_text(encoding="utf-8")
        written = json.loads(text)["format"] if text else FORMAT
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not mark a folder of backups; name another folder, or move it away") from error
    refuse_other(str(path), written, reads=FORMAT)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / MARKER).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{folder}: another backup is being written to it; wait for its end") from error
        if not file.tell():
            file.write(json.dumps({"format": FORMAT}) + "\n")
            file.flush()
        yield


def _names(folder: Path) -> list[str]:
    """The snapshots of a backup, the oldest first."""
    return sorted(path.parent.name for path in folder.glob(f"[!.]*/{MANIFEST}"))


def _newest(folder: Path) -> BackupSnapshot | None:
    """The newest snapshot, whose files the next one links to; None for none, and with a warning for a damaged one."""
    names = _names(folder)
    try:
        return _read(folder, names[-1]) if names else None
    except CorruptArtifact as error:
        log.warning("this snapshot copies every file, since the newest one cannot be read: %s", error)
        return None


def _chosen(folder: Path, at: str | None) -> BackupSnapshot:
    names = _names(folder)
    if not names:
        raise ValueError(f"{folder} holds no backup; `vila-ops backup DIR` makes one")
    if at is not None and at not in names:
        raise ValueError(f"{folder} has no snapshot {at!r}; it has {', '.join(names)}")
    return _read(folder, at or names[-1])


def _read(folder: Path, name: str) -> BackupSnapshot:
    path = folder / name / MANIFEST
    try:
        body = json.loads(path.read_bytes())
        if body.pop("checksum") != fingerprint(body):
            raise _damaged(path, "was changed after it was written", folder)
        refuse_other(str(path), body["format"], reads=FORMAT)  # whose other fields may be any
        snapshot = BackupSnapshot.model_validate(body)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise _damaged(path, f"is not the list of a snapshot ({error})", folder) from error
    if snapshot.name != name:
        raise _damaged(path, "was changed after it was written", folder)
    if foreign := next((one for one in snapshot.files if not _is_of_snapshot(one)), None):
        raise _damaged(path, f"names {foreign!r}, which is no file of a backup", folder)
    return snapshot


def _is_of_snapshot(name: str) -> bool:
    """Whether a snapshot may have a file of this name, which says where it is restored."""
    first, *below = name.split("/")
    if first in (*KEYS, REGISTRY, ARTIFACTS):
        return bool(below) and not {"", ".", ".."} & {*below}
    return name in (MLFLOW, PREFECT)


def _damaged(path: Path, what: str, folder: Path) -> CorruptArtifact:
    others = [name for name in _names(folder) if name != path.relative_to(folder).parts[0]]
    way = f"restore another snapshot by --at: {', '.join(others)}" if others else "restore from another backup"
    return CorruptArtifact(f"{path} {what}; {way}")


def _check_empty(root: str, databases: dict[str, Path]) -> None:
    """Raise ValueError where a restored file would meet others."""
    taken = [root] if any(entry.name != FORMAT_MARK for entry in backend(root).entries(root)) else []
    _refuse(taken + [str(path) for path in _places(databases) if path.exists() and not path.is_relative_to(root)])


def _places(databases: dict[str, Path]) -> list[Path]:
    """What a restore writes outside of the store, and files that sqlite would take for parts of it."""
    places = [path.with_name(f"{path.name}{end}") for path in databases.values() for end in BESIDE]
    return [*places, databases[MLFLOW].with_name(ARTIFACTS)]


def _refuse(taken: list[str]) -> None:
    if taken:
        raise ValueError(
            f"{', '.join(taken)}: nothing is restored over what is there; `vila-ops down`, move it away, and run again"
        )


def _verified(folder: Path, snapshot: BackupSnapshot) -> tuple[str, ...]:
    """Compare all of a snapshot with its digests; returns the artifacts that are not there. Raises CorruptArtifact."""
    for name, file in snapshot.files.items():
        path = folder / snapshot.name / name
        if not path.is_file():
            raise _damaged(path, "is missing", folder)
        if disk.sha256(path) != file.sha256:
            raise _damaged(path, "holds other bytes than were copied", folder)
    lacking = []
    for address, digest in snapshot.artifacts.items():
        uri = str((folder / STORE / address).resolve())
        if find_manifest(uri) is None:
            log.warning("%s is not in the backup; the next run makes it again", address)
            lacking.append(address)
        elif (there := verify_folder(uri)) != digest:
            raise CorruptArtifact(
                f"{uri} holds digest {there[:12]}..., not {digest[:12]}...; move it away, and run again"
            )
    return tuple(lacking)


def _put_back(copied: Path, name: str, file: CopiedFile, root: str, databases: dict[str, Path]) -> None:
    """Write one file of a snapshot to where it was; on a disk, a key gets the time that it had."""
    kind, _, inside = name.partition("/")
    if kind in KEYS:
        backend(root).create(f"{root}/{name}", copied.read_bytes())
        if "://" not in root:
            os.utime(f"{root}/{name}", (file.changed, file.changed))
    elif kind == REGISTRY:
        backend(root).swap(f"{root}/{name}", copied.read_bytes(), None)
    else:
        target = databases[name] if name in databases else databases[MLFLOW].with_name(ARTIFACTS) / inside
        draft = target.with_name(f".{target.name}.restored")
        target.parent.mkdir(parents=True, exist_ok=True)
        with faults_named(draft):
            shutil.copyfile(copied, draft)
            draft.replace(target)
