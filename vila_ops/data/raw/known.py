"""What a scan saw of raw files, so that whoever reads them later, on any machine, notices one that changed since.

For each file there are hashes of its path alone, of its path with its content, and of its path with the version that
the disk or the store states: 24 bytes a file, which every worker can have.
"""

import errno
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from stat import S_ISREG

import numpy as np
from numpy.typing import NDArray

from vila_ops.artifacts.disk import known_sha256
from vila_ops.data.raw.objects import ObjectPath, changed, raw_path

MISSING = "missing"
"""Stands for the digest of a file that does not exist."""
NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EBADF, errno.ELOOP)
"""Error numbers that mean that there is no file, as for `Path.is_file`."""


def version_of(path: Path) -> str | None:
    """What the disk or the store states of a file, without reading it; None if there is none."""
    if isinstance(path, ObjectPath):
        entry = path.entry()
        return None if entry is None else f"{entry.size} {entry.tag}"
    try:
        status = path.stat()
    except OSError as error:
        if error.errno in NO_FILE:
            return None
        raise
    if not S_ISREG(status.st_mode):
        return None
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"


def sha256_of(path: Path) -> str:
    """Hex digest of the bytes of a file or an object, which is streamed."""
    if not isinstance(path, ObjectPath):
        return known_sha256(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def hashes(path: str, digest: str, version: str | None) -> bytes:
    """The hashes of one file; `version` is None where it may stay the same though the content changes."""
    told = (_hash(path), _hash(path, digest), *(() if version is None else (_hash(path, version),)))
    return b"".join(told)


class Known:
    """The files that a scan saw."""

    def __init__(self, sorted_hashes: NDArray[np.uint64]) -> None:
        self._hashes = sorted_hashes

    @classmethod
    def of(cls, parts: Iterable[bytes]) -> "Known":
        """Of the hashes of many files."""
        return cls(np.unique(np.frombuffer(b"".join(parts), np.uint64)))

    @property
    def array(self) -> NDArray[np.uint64]:
        """The hashes, sorted."""
        return self._hashes

    def check(self, place: str) -> None:
        """Compare the version of a file with that which was scanned, or else its content. Raises RawChanged."""
        if not self._holds(_hash(place)):
            return
        path = raw_path(place)
        version = version_of(path)
        if version is not None and self._holds(_hash(place, version)):
            return
        if not self._holds(_hash(place, MISSING if version is None else sha256_of(path))):
            raise changed(place)

    def check_content(self, place: str, data: bytes | None) -> None:
        """Compare the content of a file, None if there is no file, with what was scanned. Raises RawChanged."""
        if self._holds(_hash(place)):
            digest = MISSING if data is None else hashlib.sha256(data).hexdigest()
            if not self._holds(_hash(place, digest)):
                raise changed(place)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it, `known` returns this."""
        token = _known.set(self)
        try:
            yield
        finally:
            _known.reset(token)

    def _holds(self, one: bytes) -> bool:
        value = np.frombuffer(one, np.uint64)[0]
        at = int(np.searchsorted(self._hashes, value))
        return at < len(self._hashes) and self._hashes[at] == value


NOTHING = Known.of(())
_known: ContextVar[Known] = ContextVar("known", default=NOTHING)


def known() -> Known:
    """What the scan saw of the source that is read now; nothing outside of `prepare`."""
    return _known.get()


def _hash(path: str, told: str = "") -> bytes:
    return hashlib.blake2b(f"{path}\0{told}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
