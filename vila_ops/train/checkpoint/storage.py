"""Storage of resume checkpoints on disk or S3.

A checkpoint exists once its draft is renamed (disk) or its manifest is written (S3). On S3, the name of a checkpoint
includes a nonce of the attempt, step-000050-NONCE, so that no attempt ever overwrites a file.
"""

import logging
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

from vila_ops.artifacts import disk
from vila_ops.artifacts.backend import FileFacts
from vila_ops.artifacts.copies import copy_of
from vila_ops.artifacts.disk_faults import free_bytes
from vila_ops.artifacts.store import MANIFEST, backend
from vila_ops.errors import CorruptArtifact, OtherBytes, StoreUnreachable

STEP = "step-"
"""How the name of a checkpoint begins."""
log = logging.getLogger(__name__)


class SealedCheckpoint(NamedTuple):
    """A checkpoint that has a manifest."""

    step: int
    name: str


class CheckpointStorage(Protocol):
    """The checkpoints of one stage. A draft is named by its step and attempt; all ranks write into the same draft."""

    @property
    def root(self) -> Path | str:
        """Return the place of the checkpoints."""

    def sealed(self) -> list[SealedCheckpoint]:
        """Return the sealed checkpoints, oldest first."""

    def write(self, draft: str, name: str, chunks: Iterable[memoryview], num_bytes: int) -> None:
        """Write a file of a draft durably. The chunks have `num_bytes` together."""

    def seal(self, draft: str, manifest: bytes, sizes: dict[str, int]) -> None:
        """Make a draft a checkpoint. Its files must have these sizes in bytes."""

    def manifest(self, name: str) -> bytes:
        """Return the manifest of a checkpoint. Raises CorruptArtifact if it cannot be read."""

    def file(self, name: str, file: str, facts: FileFacts) -> Path:
        """Return the path of a file on this machine, after its checksum was compared. Raises CorruptArtifact."""

    def release(self) -> None:
        """Free the local copies that `file` returned."""

    def remove(self, name: str) -> None:
        """Remove a checkpoint."""

    def discard(self, draft: str) -> None:
        """Remove the files of a draft."""

    def drafts(self) -> list[str]:
        """Return the places of drafts, and of checkpoints whose removal was interrupted."""


def storage_of(resume: str) -> CheckpointStorage:
    """Return the storage for a folder or `s3://bucket/prefix`."""
    return S3Storage(resume) if "://" in resume else DiskStorage(resume)


def remove_all(resume: str) -> None:
    """Remove all resume checkpoints of a sealed stage. Files that cannot be removed are logged."""
    try:
        backend(resume).remove(resume)
    except OSError as error:
        log.warning("resume checkpoints %s were not removed (%s); `vila-ops gc` removes them", resume, error)


class DiskStorage:
    """See CheckpointStorage. A draft is a hidden folder beside the checkpoints."""

    def __init__(self, root: str) -> None:
        self.root = Path(root)

    def sealed(self) -> list[SealedCheckpoint]:
        """See CheckpointStorage."""
        folders = [path for path in self.root.glob(f"{STEP}*") if (path / MANIFEST).is_file()]
        return sorted(SealedCheckpoint(int(path.name.removeprefix(STEP)), path.name) for path in folders)

    def write(self, draft: str, name: str, chunks: Iterable[memoryview], num_bytes: int) -> None:
        """See CheckpointStorage. Raises OSError with the path and the bytes that are written, needed and free."""
        folder, written = self._draft(draft), 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / name).open("wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                    written += len(chunk)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(
                error.errno,
                f"resume checkpoint {folder / name} was not written ({error.strerror}, after {written} of {num_bytes} "
                f"bytes; {free_bytes(self.root)} bytes are free); free space or repair the disk and run again: the "
                f"stage resumes from the checkpoint before it",
            ) from error

    def seal(self, draft: str, manifest: bytes, sizes: dict[str, int]) -> None:
        """See CheckpointStorage. Renames the draft, and replaces a checkpoint of the same step if there is one."""
        folder, (_, step, _) = self._draft(draft), draft.split("-")
        for name, size in sizes.items():
            if not (folder / name).is_file() or (folder / name).stat().st_size != size:
                raise ValueError(
                    f"{folder / name} does not have the {size} bytes that its rank wrote; all ranks must see the "
                    f"same folder: use a store on a shared file system, or s3://BUCKET/PREFIX"
                )
        self.write(draft, MANIFEST, [memoryview(manifest)], len(manifest))
        target = self.root / f"step-{step}"
        try:
            disk.sync(folder)
            if target.exists():
                target.rename(folder.with_name(f"{folder.name}-replaced"))
            folder.rename(target)
            disk.sync(self.root)
        except OSError as error:
            raise OSError(
                error.errno,
                f"resume checkpoint {target} was not sealed ({error.strerror}); repair the disk and run again",
            ) from error
        shutil.rmtree(folder.with_name(f"{folder.name}-replaced"), ignore_errors=True)

    def manifest(self, name: str) -> bytes:
        """See CheckpointStorage."""
        try:
            return (self.root / name / MANIFEST).read_bytes()
        except OSError as error:
            raise CorruptArtifact(f"{self.root / name / MANIFEST}: {error.strerror}") from error

    def file(self, name: str, file: str, facts: FileFacts) -> Path:
        """See CheckpointStorage."""
        path = self.root / name / file
        try:
            sha256 = disk.sha256(path)
        except OSError as error:
            raise CorruptArtifact(f"{path}: {error.strerror}") from error
        if sha256 != facts["sha256"]:
            raise CorruptArtifact(f"{path} has sha256 {sha256[:12]}..., its manifest says {facts['sha256'][:12]}...")
        return path

    def release(self) -> None:
        """See CheckpointStorage. There are no copies: `file` returns the checkpoint's own files."""

    def remove(self, name: str) -> None:
        """See CheckpointStorage. A partly removed folder has a hidden name, so it does not count as a checkpoint."""
        disk.remove(str(self.root / name))

    def discard(self, draft: str) -> None:
        """See CheckpointStorage."""
        shutil.rmtree(self._draft(draft), ignore_errors=True)

    def drafts(self) -> list[str]:
        """See CheckpointStorage."""
        return [str(path) for path in sorted(self.root.glob(f".{STEP}*"))]

    def _draft(self, draft: str) -> Path:
        return self.root / f".{draft}"


class S3Storage:
    """See CheckpointStorage. `artifacts/s3_calls.py` retries every call a bounded number of times."""

    def __init__(self, root: str) -> None:
        from vila_ops.artifacts import s3  # heavy: boto3

        self.root, self.s3 = root, s3

    def sealed(self) -> list[SealedCheckpoint]:
        """See CheckpointStorage."""
        folders = [folder for folder, _, file in self._names() if file == MANIFEST]
        return sorted(SealedCheckpoint(int(folder.split("-")[1]), folder) for folder in folders)

    def write(self, draft: str, name: str, chunks: Iterable[memoryview], num_bytes: int) -> None:
        """See CheckpointStorage."""
        self.s3.write(f"{self.root}/{draft}/{name}", chunks)

    def seal(self, draft: str, manifest: bytes, sizes: dict[str, int]) -> None:
        """See CheckpointStorage. S3 has acknowledged every file, so sizes are not checked again."""
        self.s3.create(f"{self.root}/{draft}/{MANIFEST}", manifest)

    def manifest(self, name: str) -> bytes:
        """See CheckpointStorage."""
        uri = f"{self.root}/{name}/{MANIFEST}"
        try:
            manifest = self.s3.read(uri)
        except StoreUnreachable as error:
            if isinstance(error.__cause__, OtherBytes):  # also after retries
                raise CorruptArtifact(f"{uri}: {error.__cause__}") from error
            raise
        if manifest is None:
            raise CorruptArtifact(f"{uri} does not exist")
        return manifest

    def file(self, name: str, file: str, facts: FileFacts) -> Path:
        """See CheckpointStorage. Each machine downloads it once."""
        return self.s3.local(f"{self.root}/{name}/{file}", facts)

    def release(self) -> None:
        """See CheckpointStorage. Removes this machine's copies."""
        shutil.rmtree(copy_of(self.root), ignore_errors=True)

    def remove(self, name: str) -> None:
        """See CheckpointStorage. Removes the manifest first, so that a partly removed one does not count as sealed."""
        self.s3.remove(f"{self.root}/{name}/{MANIFEST}")
        self.s3.remove(f"{self.root}/{name}")

    def discard(self, draft: str) -> None:
        """See CheckpointStorage. If the store is unreachable, the next attempt removes the draft."""
        with suppress(OSError):
            self.remove(draft)

    def drafts(self) -> list[str]:
        """See CheckpointStorage."""
        sealed = {one.name for one in self.sealed()}
        begun = {folder for folder, _, _ in self._names() if folder.startswith(STEP)}
        return [f"{self.root}/{folder}" for folder in sorted(begun - sealed)]

    def _names(self) -> list[tuple[str, str, str]]:
        """The folder, a slash and the rest of the name of every object."""
        return [name.partition("/") for name in self.s3.names(self.root)]
