"""Ask, work, seal last: content-addressed folders with a manifest that is written once.

    store/<kind>/<key>/manifest.json       sealed: written by one create-only link(2)
    store/<kind>/<key>/<attempt>/...       the files; an attempt without a manifest was never finished

The first seal of an address wins; a later one, also of a process that slept through it, is told what won.
"""

import hashlib
import json
import logging
import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vila_ops.artifacts.kinds import Artifact, Checkpoint, Dataset, EvalReport, Pretrained
from vila_ops.config import fingerprint

FORMAT = 1
MANIFEST = "manifest.json"
KINDS: dict[type[Artifact], str] = {
    Dataset: "dataset",
    Pretrained: "pretrained",
    Checkpoint: "checkpoint",
    EvalReport: "report",
}
ANY_EXECUTION: dict[str, Any] = {"seconds": 0.0, "sealed": "1970-01-01T00:00:00+00:00", "workers": []}
"""The execution of an exported manifest: no attempt's own, and older than any run, which so counts it as reused."""

A = TypeVar("A", bound=Artifact)
log = logging.getLogger(__name__)


class CorruptArtifact(ValueError):
    """A sealed folder does not hold what its manifest says."""


@dataclass(frozen=True)
class Address:
    """Where the answer to one question lies: kind + hash(room revision, recipe part, parents' digests)."""

    kind: str
    key: str
    recipe: Any
    """The recipe part, as JSON values."""
    parents: tuple[str, ...]
    """Digests of what it is made from."""

    def folder(self, store: Path) -> Path:
        """The folder of this address in a store."""
        return store / self.kind / self.key


def address(kind: type[Artifact], *, revision: int, recipe: Any, parents: tuple[str, ...]) -> Address:
    """The address of what a room of this revision makes of a recipe part (JSON values) and of these parents."""
    name = KINDS[kind]
    question = {"kind": name, "revision": revision, "recipe": recipe, "parents": parents}
    return Address(name, fingerprint(question)[:32], recipe, parents)


def find(kind: type[A], at: Address, *, store: Path, first: Path | None = None) -> A | None:
    """The sealed artifact at an address, or None. `first` is a folder to look in before the store (DVC's output).

    Checks that every file is there with its size; `verify` reads the bytes.
    """
    for folder in (first, at.folder(store)):
        if folder is None or not (folder / MANIFEST).exists():
            continue
        manifest = read_manifest(folder)
        if manifest["address"] == f"{at.kind}/{at.key}":
            _check_sizes(folder, manifest)
            return _handle(kind, folder, manifest)
    return None


def begin(at: Address, *, store: Path) -> Path:
    """A fresh folder of this attempt, to work in until `seal`."""
    folder = at.folder(store) / f"attempt-{secrets.token_hex(6)}"
    folder.mkdir(parents=True)
    return folder


def seal(kind: type[A], at: Address, attempt: Path, *, facts: dict[str, Any], execution: dict[str, Any]) -> A:
    """Publish an attempt: every file synced and hashed, then one create-only manifest.

    facts are the handle's own fields and part of the digest; execution (times, machine, versions) is not.
    Returns what is sealed at the address, which is another attempt's work if that one came first.
    """
    folder = attempt.parent
    files = {str(path.relative_to(attempt)): _measure(path) for path in _files(attempt)}
    manifest = {
        "format": FORMAT,
        "address": f"{at.kind}/{at.key}",
        "digest": _digest(at.kind, files, facts),
        "data": attempt.name,
        "files": files,
        "parents": at.parents,
        "facts": facts,
        "recipe": at.recipe,
        "execution": execution,
    }
    _sync_tree(attempt)
    if not _create_only(folder / MANIFEST, _sealed(manifest)):
        log.warning("%s was sealed by another attempt first; this one is dropped", folder)
        shutil.rmtree(attempt)
    return _handle(kind, folder, read_manifest(folder))


def verify(artifact: Artifact) -> None:
    """Read every byte of an artifact; raises CorruptArtifact that names the first file that differs."""
    sealed = verify_folder(Path(artifact.uri))
    if sealed != artifact.digest:
        raise CorruptArtifact(f"{artifact.uri} holds digest {sealed}, not {artifact.digest}")


def verify_folder(folder: Path) -> str:
    """Read every byte of a sealed folder; returns its digest, raises CorruptArtifact where something differs."""
    manifest = read_manifest(folder)
    _check_sizes(folder, manifest)
    for name, expected in manifest["files"].items():
        actual = sha256(folder / manifest["data"] / name)
        if actual != expected["sha256"]:
            raise CorruptArtifact(
                f"{folder / manifest['data'] / name} has sha256 {actual[:12]}..., sealed as "
                f"{expected['sha256'][:12]}...; {_way_out(folder)}"
            )
    stated = _digest(manifest["address"].split("/")[0], manifest["files"], manifest["facts"])
    if stated != manifest["digest"]:
        raise CorruptArtifact(f"{folder / MANIFEST} was changed after sealing; {_way_out(folder)}")
    return stated


def content(artifact: Artifact) -> Path:
    """The folder in which a sealed artifact's files lie."""
    folder = Path(artifact.uri)
    return folder / str(read_manifest(folder)["data"])


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a sealed folder."""
    path = folder / MANIFEST
    try:
        text = path.read_text()
        manifest: dict[str, Any] = json.loads(text)
        written = manifest["format"]
    except FileNotFoundError as error:
        raise CorruptArtifact(f"{folder} has no {MANIFEST}: it was never finished, or it was removed") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptArtifact(f"{path} is not a manifest ({error}); {_way_out(folder)}") from error
    if written != FORMAT:
        raise CorruptArtifact(f"{path} has format {written}; this version reads {FORMAT}")
    if text != _sealed(manifest):
        raise CorruptArtifact(f"{path} was changed after sealing; {_way_out(folder)}")
    return manifest


def export(artifact: Artifact, target: Path) -> None:
    """Copy a sealed folder to `target`, manifest last, replacing what is there; an edit of the copy stays there.

    The copy's bytes do not depend on which attempt made them, so that DVC sees no change where there is none.
    """
    source = Path(artifact.uri)
    manifest = read_manifest(source)
    fresh = target.with_name(f".{target.name}-{secrets.token_hex(6)}")
    fresh.mkdir(parents=True)
    for name in manifest["files"]:
        (fresh / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / manifest["data"] / name, fresh / "files" / name)
    (fresh / MANIFEST).write_text(_sealed({**manifest, "data": "files", "execution": ANY_EXECUTION}))
    _sync_tree(fresh)
    if target.exists():
        old = target.with_name(f".{target.name}-old-{secrets.token_hex(6)}")
        target.rename(old)
        fresh.rename(target)
        shutil.rmtree(old)
    else:
        fresh.rename(target)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Force a file or folder to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _handle(kind: type[A], folder: Path, manifest: dict[str, Any]) -> A:
    return kind.model_validate(
        {"uri": str(folder), "digest": manifest["digest"], "parents": manifest["parents"], **manifest["facts"]}
    )


def _digest(kind: str, files: dict[str, Any], facts: dict[str, Any]) -> str:
    return fingerprint({"kind": kind, "files": {name: file["sha256"] for name, file in files.items()}, "facts": facts})


def _sealed(manifest: dict[str, Any]) -> str:
    """The one text of a manifest, its own checksum in it: any other byte in the file is damage."""
    body = {key: value for key, value in manifest.items() if key != "checksum"}
    return json.dumps({**body, "checksum": fingerprint(body)}, indent=1, sort_keys=True)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _measure(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def _check_sizes(folder: Path, manifest: dict[str, Any]) -> None:
    for name, expected in manifest["files"].items():
        path = folder / manifest["data"] / name
        if not path.is_file():
            raise CorruptArtifact(f"{path} is missing; {_way_out(folder)}")
        if path.stat().st_size != expected["size"]:
            raise CorruptArtifact(
                f"{path} has {path.stat().st_size} bytes, sealed with {expected['size']}; {_way_out(folder)}"
            )


def _way_out(folder: Path) -> str:
    return f"restore the file from a backup, or move {folder} away and run again to make it anew"


def _sync_tree(folder: Path) -> None:
    for path in [*_files(folder), *(p for p in folder.rglob("*") if p.is_dir()), folder]:
        sync(path)


def _create_only(path: Path, text: str) -> bool:
    """Write a file whole or not at all, and only if there is none: link(2) fails where the name is taken."""
    draft = path.with_name(f".{path.name}-{secrets.token_hex(6)}")
    with draft.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    sync(path.parent)
    return True
