"""Where resume checkpoints lie: on disk one appears by a rename, on S3 by its manifest, which is put last.

On S3 each attempt writes under a name of its own, step-000050-NONCE, so that nothing there is ever overwritten.
"""

import logging
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

from vila_ops.artifacts import disk
from vila_ops.artifacts.backend import CorruptArtifact, FileFacts
from vila_ops.artifacts.copies import copy_of
from vila_ops.artifacts.store import MANIFEST

log = logging.getLogger(__name__)


class Sealed(NamedTuple):
    """A checkpoint that has its manifest."""

    step: int
    name: str


class CheckpointStorage(Protocol):
    """The checkpoints of one stage. A draft is named by its step and its attempt; the ranks write into the same."""

    def sealed(self) -> list[Sealed]:
        """Those with a manifest, oldest first."""

    def write(self, draft: str, name: str, chunks: Iterable[memoryview]) -> None:
        """Make a file of a draft durable."""

    def seal(self, draft: str, manifest: bytes, sizes: dict[str, int]) -> None:
        """Make a draft, whose files have these sizes, a checkpoint."""

    def manifest(self, name: str) -> bytes:
        """The manifest of a checkpoint. Raises CorruptArtifact where it cannot be read."""

    def file(self, name: str, file: str, facts: FileFacts) -> Path:
        """A file on this machine, every byte compared with its facts. Raises CorruptArtifact."""

    def release(self) -> None:
        """The files that `file` gave are needed no more."""

    def remove(self, name: str) -> None:
        """Remove a checkpoint."""

    def discard(self, draft: str) -> None:
        """Remove what there is of a draft."""

    def clear(self) -> None:
        """Remove the drafts of attempts that were killed."""


def storage_of(resume: str) -> CheckpointStorage:
    """A folder, or `s3://bucket/prefix`."""
    return S3Storage(resume) if "://" in resume else DiskStorage(resume)


def remove_all(resume: str) -> None:
    """Remove all checkpoints of a stage that is sealed and needs them no more; what stays is told."""
    try:
        if "://" in resume:
            from vila_ops.artifacts import s3  # heavy: boto3

            s3.remove(resume)
        elif Path(resume).exists():
            shutil.rmtree(resume)
    except OSError as error:
        log.warning(
            "resume checkpoints %s were not removed (%s); nothing needs them, remove them by hand", resume, error
        )


class DiskStorage:
    """See Shelf. A draft is the hidden folder beside what it becomes."""

    def __init__(self, root: str) -> None:
        self.root = Path(root)

    def sealed(self) -> list[Sealed]:
        """See Shelf."""
        found = [path for path in self.root.glob("step-*") if (path / MANIFEST).is_file()]
        return sorted(Sealed(int(path.name.removeprefix("step-")), path.name) for path in found)

    def write(self, draft: str, name: str, chunks: Iterable[memoryview]) -> None:
        """See Shelf. An OSError tells the path and how far it came."""
        folder, done = self._draft(draft), 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / name).open("wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                    done += len(chunk)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(
                error.errno,
                f"resume checkpoint {folder / name} was not written ({error.strerror}, after {done} bytes; "
                f"{_free(self.root)} bytes are free); make room or repair the disk and run again: the stage goes on "
                f"from the checkpoint before it",
            ) from error

    def seal(self, draft: str, manifest: bytes, sizes: dict[str, int]) -> None:
        """See Shelf. One rename; one of the same step, from which this attempt did not go on, makes way."""
        folder, (_, step, _) = self._draft(draft), draft.split("-")
        for name, size in sizes.items():
            if not (folder / name).is_file() or (folder / name).stat().st_size != size:
                raise ValueError(
                    f"{folder / name} does not have the {size} bytes that its rank wrote; all ranks must see the "
                    f"same folder: use a store on a shared file system, or s3://BUCKET/PREFIX"
                )
        self.write(draft, MANIFEST, [memoryview(manifest)])
        target = self.root / f"step-{step}"
        try:
            disk.sync(folder)
            if target.exists():
                target.rename(folder.with_name(f"{folder.name}-instead"))
            folder.rename(target)
            disk.sync(self.root)
        except OSError as error:
            raise OSError(
                error.errno,
                f"resume checkpoint {target} was not sealed ({error.strerror}); repair the disk and run again",
            ) from error
        shutil.rmtree(folder.with_name(f"{folder.name}-instead"), ignore_errors=True)

    def manifest(self, name: str) -> bytes:
        """See Shelf."""
        try:
            return (self.root / name / MANIFEST).read_bytes()
        except OSError as error:
            raise CorruptArtifact(f"{self.root / name / MANIFEST}: {error.strerror}") from error

    def file(self, name: str, file: str, facts: FileFacts) -> Path:
        """See Shelf."""
        path = self.root / name / file
        try:
            found = disk.sha256(path)
        except OSError as error:
            raise CorruptArtifact(f"{path}: {error.strerror}") from error
        if found != facts["sha256"]:
            raise CorruptArtifact(f"{path} has sha256 {found[:12]}..., written as {facts['sha256'][:12]}...")
        return path

    def release(self) -> None:
        """See Shelf. They are the checkpoint's own."""

    def remove(self, name: str) -> None:
        """See Shelf. Hidden first: one that is half removed is no checkpoint."""
        hidden = self.root / f".{name}-removed"
        (self.root / name).rename(hidden)
        shutil.rmtree(hidden)

    def discard(self, draft: str) -> None:
        """See Shelf."""
        shutil.rmtree(self._draft(draft), ignore_errors=True)

    def clear(self) -> None:
        """See Shelf."""
        for path in self.root.glob(".step-*"):
            shutil.rmtree(path)

    def _draft(self, draft: str) -> Path:
        return self.root / f".{draft}"


class S3Storage:
    """See Shelf. Every call is tried again a bounded number of times: see `artifacts/s3_calls.py`."""

    def __init__(self, root: str) -> None:
        from vila_ops.artifacts import s3, s3_calls  # heavy: boto3

        self.root, self.s3, self.calls = root, s3, s3_calls

    def sealed(self) -> list[Sealed]:
        """See Shelf."""
        folders = [folder for folder, _, file in self._names() if file == MANIFEST]
        return sorted(Sealed(int(folder.split("-")[1]), folder) for folder in folders)

    def write(self, draft: str, name: str, chunks: Iterable[memoryview]) -> None:
        """See Shelf."""
        self.s3.write(f"{self.root}/{draft}/{name}", chunks)

    def seal(self, draft: str, manifest: bytes, sizes: dict[str, int]) -> None:
        """See Shelf. S3 has acknowledged every file."""
        self.s3.create(f"{self.root}/{draft}/{MANIFEST}", manifest)

    def manifest(self, name: str) -> bytes:
        """See Shelf."""
        uri = f"{self.root}/{name}/{MANIFEST}"
        try:
            found = self.s3.read(uri)
        except self.calls.StoreUnreachable as error:
            if isinstance(error.__cause__, self.calls.OtherBytes):  # asked again, and it stayed so
                raise CorruptArtifact(f"{uri}: {error.__cause__}") from error
            raise
        if found is None:
            raise CorruptArtifact(f"{uri} is gone")
        return found

    def file(self, name: str, file: str, facts: FileFacts) -> Path:
        """See Shelf. Downloaded once a machine."""
        return self.s3.local(f"{self.root}/{name}/{file}", facts)

    def release(self) -> None:
        """See Shelf. Removes this machine's copies."""
        shutil.rmtree(copy_of(self.root), ignore_errors=True)

    def remove(self, name: str) -> None:
        """See Shelf. Its manifest first: one that is half removed is no checkpoint."""
        self.s3.remove(f"{self.root}/{name}/{MANIFEST}")
        self.s3.remove(f"{self.root}/{name}")

    def discard(self, draft: str) -> None:
        """See Shelf. What an unreachable store keeps of it, the next attempt removes."""
        with suppress(OSError):
            self.remove(draft)

    def clear(self) -> None:
        """See Shelf."""
        sealed = {one.name for one in self.sealed()}
        for folder in {folder for folder, _, _ in self._names()} - sealed:
            self.s3.remove(f"{self.root}/{folder}")

    def _names(self) -> list[tuple[str, str, str]]:
        """Of every object its folder, a slash, and the rest of its name."""
        return [name.partition("/") for name in self.s3.names(self.root)]


def _free(folder: Path) -> int:
    """Bytes free on the file system of a folder; 0 where even that cannot be asked."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0
