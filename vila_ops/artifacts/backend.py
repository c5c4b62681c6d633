"""The protocol of a store, which the modules `disk` and `s3` implement. A place in a store is a URI in one string."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NotRequired, Protocol, TypedDict

AT_ONCE = 8
"""Files that are read, sent or looked up at the same time."""
GRACE_SECONDS = 24 * 3600.0
"""How long something must not have changed before a task removes it as left by a killed process."""


class FileFacts(TypedDict):
    """The entry of one file in a manifest."""

    size: int
    """Bytes."""
    sha256: str
    at: NotRequired[str]
    """Place of the bytes, relative to the store's root, if another sealed artifact holds them."""


class Entry(NamedTuple):
    """One file or folder below a place."""

    name: str
    """Relative to the place."""
    size: int
    """Bytes; 0 for a folder."""
    changed: float
    """Time of its last change, in seconds since 1970 by the clock of the store."""
    arrived: float
    """As `changed`, but a copy that keeps the times of what it copies (`rsync -a`) does not set it back."""


class Versioned(NamedTuple):
    """The content of a register and the name of this version."""

    data: bytes
    tag: str


def way_out(uri: str, *sharing: str) -> str:
    """What to do about a damaged sealed folder. `sharing` are the other folders that hold the damaged file."""
    if not sharing:
        return f"restore it from a backup, or move {uri} away and run again to rebuild it"
    return (
        f"it is one file of {1 + len(sharing)} sealed folders: restore it from a backup, or move all of "
        f"{', '.join((uri, *sharing))} away and run again to rebuild them"
    )


class Backend(Protocol):
    """One kind of store."""

    def read(self, uri: str) -> bytes | None:
        """The bytes at a place; None if nothing is there."""

    def create(self, uri: str, data: bytes) -> bool:
        """Write whole or not at all, and only if nothing is there; False if something is."""

    def load(self, uri: str) -> Versioned | None:
        """The current version of a register; None if it has none."""

    def swap(self, uri: str, data: bytes, tag: str | None) -> str | None:
        """Replace version `tag` of a register (None: create the first); the new tag, or None if it has changed."""

    def begin(self, uri: str) -> Path:
        """A new local folder for the files of an attempt."""

    def publish(self, attempt: Path, uri: str) -> None:
        """Make every file of the local folder durable at `uri`."""

    def discard(self, attempt: Path, uri: str) -> None:
        """Remove an attempt's files on this machine and in the store."""

    def entries(self, uri: str) -> list[Entry]:
        """All files below a place, on disk its folders too; none if nothing is there."""

    def remove(self, uri: str) -> None:
        """Remove a file, or a folder with all that is in it; nothing happens if it is gone."""

    def sizes(self, uris: Sequence[str]) -> list[int | None]:
        """Size of each file in bytes; None for a missing one."""

    def digest(self, uri: str, expected: FileFacts) -> str:
        """sha256 of the bytes that the store holds, read again where it differs from the expected one."""

    def check(self, uri: str, facts: FileFacts) -> None:
        """Compare a file in the store with its sha256. Raises DamagedFile."""

    def fetch(self, uri: str, facts: FileFacts) -> None:
        """Download a file that this machine has not, or not with its size. Raises DamagedFile."""

    def local(self, uri: str, facts: FileFacts) -> Path:
        """The file on this machine, compared with its sha256 once per process. Raises DamagedFile."""

    def folder(self, uri: str, files: Mapping[str, tuple[str, FileFacts]]) -> Path:
        """A folder on this machine with these files, as by `local`. `files` maps a name to place and facts."""

    def copy(self, uri: str, facts: FileFacts, target: Path) -> None:
        """Copy a file to `target`, compared as by `local`."""

    def sharing(self, uri: str, root: str, kinds: Iterable[str]) -> list[str]:
        """The folders STORE/KIND/KEY that hold this very file, as their own or as a hard link."""

    def timed(self, root: str, data: bytes) -> tuple[float, float]:
        """Seconds of writing a file of its own and of reading it back. Raises StoreRefused, and as the others do."""

    def probe(self, root: str) -> str:
        """Try what sealing rests on; returns a line that says what works. Raises StoreRefused, UnsafeStore."""
