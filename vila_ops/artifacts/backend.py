"""What a store has to be able to do. `disk` and `s3` are the two modules that can; places are URIs in one string."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NotRequired, Protocol, TypedDict

AT_ONCE = 8
"""Files that are read, sent or asked about at the same time."""


class FileFacts(TypedDict):
    """What a manifest says of one file."""

    size: int
    """Bytes."""
    sha256: str
    at: NotRequired[str]
    """Where the bytes lie, relative to the store's root, if they are those of another sealed artifact."""


class Versioned(NamedTuple):
    """What a register holds, and the name of this version of it."""

    data: bytes
    tag: str


def way_out(uri: str, *sharing: str) -> str:
    """What to do about a damaged sealed folder; `sharing` are the others that hold the same damaged file."""
    if not sharing:
        return f"restore it from a backup, or move {uri} away and run again to rebuild it"
    return (
        f"it is one file of {1 + len(sharing)} sealed folders: restore it from a backup, or move all of "
        f"{', '.join((uri, *sharing))} away and run again to rebuild them"
    )


class Backend(Protocol):
    """One kind of store."""

    def read(self, uri: str) -> bytes | None:
        """The bytes at a place, None where there are none."""

    def create(self, uri: str, data: bytes) -> bool:
        """Write whole or not at all, and only where nothing is; False if something is there already."""

    def load(self, uri: str) -> Versioned | None:
        """What a register holds now."""

    def swap(self, uri: str, data: bytes, tag: str | None) -> str | None:
        """Replace the version `tag` of a register (None: make its first); the new tag, or None if it has changed."""

    def begin(self, uri: str) -> Path:
        """A fresh local folder to make an attempt's files in."""

    def publish(self, attempt: Path, uri: str) -> None:
        """Make every file of the local folder durable at `uri`."""

    def discard(self, attempt: Path, uri: str) -> None:
        """Remove an attempt's files, here and there."""

    def sizes(self, uris: Sequence[str]) -> list[int | None]:
        """Bytes of each file; None for one that is not there."""

    def digest(self, uri: str, expected: FileFacts) -> str:
        """sha256 of the bytes that the store holds; they are read again where it is not the expected one."""

    def check(self, uri: str, facts: FileFacts) -> None:
        """Compare the bytes that the store holds with their sha256. Raises DamagedFile."""

    def local(self, uri: str, facts: FileFacts) -> Path:
        """The file on this machine, compared with its sha256 once a process. Raises DamagedFile."""

    def folder(self, uri: str, files: Mapping[str, tuple[str, FileFacts]]) -> Path:
        """A folder on this machine with all these files, each given with its place and as by `local`."""

    def copy(self, uri: str, facts: FileFacts, target: Path) -> None:
        """Copy a file, as by `local`, to `target`."""

    def sharing(self, uri: str, root: str, kinds: Iterable[str]) -> list[str]:
        """The folders STORE/KIND/KEY that hold this very file, as a hard link or because it lies there."""

    def probe(self, root: str) -> str:
        """Try what sealing rests on; a line that says so. Raises UnsafeStore."""
