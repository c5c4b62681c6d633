"""The raw files of a source with their digests and scans. A file is read again only if it has changed."""

import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from vila_ops.artifacts.disk import sha256
from vila_ops.config import Config, fingerprint

Folders = Mapping[str, Path]
"""The folders of a source's packages, by package name; empty for a source of files."""
STRIDE = 16
"""Spans start at multiples of this; the offsets of these records in a file are its marks."""
SCAN_REVISION = 2
"""Raised if a format's scan returns other values for the same file."""
UNFINISHED = (".part", ".tmp", ".partial", ".crdownload")
MISSING = "missing"
"""Stands for the digest of a file that does not exist."""
_RACE_NS = 2 * 10**9
"""A file younger than this may change again under the same time stamp, so its digest is not cached."""


@dataclass(frozen=True)
class Scan:
    """The result of reading a file once."""

    count: int
    """Number of records, faulty ones included."""
    images: int
    """Number of images of all records; it determines how a file is cut into shards."""
    marks: tuple[int, ...] = ()
    """Offsets in bytes of records 0, STRIDE, 2 STRIDE, ...; empty if the format finds a record by its number."""
    beside: tuple[str, ...] = ()
    """Other files that its records refer to: relative to the working directory, or absolute."""


class RawMissing(ValueError):
    """The raw files of a source are not on this machine."""


class RawFile(Config):
    """One file of a source."""

    name: str
    """Relative to the source's path; the order of names is the order of records."""
    path: str
    digest: str
    """Digest of its bytes and of the files that its records refer to."""
    count: int
    images: int
    marks: tuple[int, ...]
    beside: int = 0
    """Number of other files that its records refer to."""
    beside_missing: int = 0
    """Number of those that are not there."""


class Thinned(Config):
    """The records that a limited source takes: `limit` of `total`, evenly spaced."""

    first: int
    """Number of records of the source before this file."""
    total: int
    limit: int

    def takes(self, number: int) -> bool:
        """Whether record `number` of the file is taken: those at p * total // limit for p in [0, limit)."""
        place = self.first + number
        return (-(-place * self.limit // self.total)) * self.total // self.limit == place


class Span(Config):
    """A range of records of one raw file."""

    name: str
    path: str
    digest: str
    start: int
    """Number of the first record, a multiple of STRIDE."""
    stop: int
    mark: int
    """Offset of the first record in bytes; 0 if the format finds a record by its number."""
    thinned: Thinned | None = None

    def takes(self, number: int) -> bool:
        """Whether the record with this number in the file is taken."""
        return self.thinned is None or self.thinned.takes(number)


def paths(root: Path, suffixes: tuple[str, ...]) -> list[tuple[str, Path]]:
    """Name and path of the files of a format: the file itself, or those of a folder, sorted; none that is hidden or
    unfinished. Raises RawMissing if there are none."""
    if root.is_file():
        return [(root.name, root)]
    if not root.is_dir():
        raise RawMissing(f"no such file or folder: {root} (looked for in {Path.cwd()})")
    by_name = {
        path.relative_to(root).as_posix(): path
        for path in root.rglob("*")
        if path.name.lower().endswith(suffixes) and path.is_file()
    }
    kept = {
        name: path
        for name, path in by_name.items()
        if not name.endswith(UNFINISHED) and not any(part.startswith(".") for part in name.split("/"))
    }
    if not kept:
        raise RawMissing(f"{root} has no file that ends in {' or '.join(suffixes)}")
    return sorted(kept.items())


def scan_files(
    files: Iterable[tuple[str, Path]], kind: str, scan: Callable[[Path], Scan], *, cache: Path
) -> list[RawFile]:
    """Scan every file; the scan of a file that did not change is taken from the cache.

    `kind` is the format, with everything that a scan depends on besides the file, such as the folder of images.
    """
    scanned = []
    with _scan_cache(cache) as cached:
        for name, path in files:
            own = cached.digest(path)
            key = f"{kind}:{SCAN_REVISION}:{path}:{own}"  # the path too: paths of other files may depend on it
            result = cached.scan(key, lambda path=path: scan(path))  # type: ignore[misc]
            beside = [[Path(other).name, cached.digest(Path(other))] for other in result.beside]
            scanned.append(
                RawFile(
                    name=name,
                    path=str(path),
                    digest=fingerprint([own, beside]) if beside else own,
                    count=result.count,
                    images=result.images,
                    marks=result.marks,
                    beside=len(beside),
                    beside_missing=sum(other == MISSING for _, other in beside),
                )
            )
    return scanned


class _ScanCache:
    """Digests by path, size and time, and scans by digest, in one SQLite file that many processes may share."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        database.execute("create table if not exists digests (path text primary key, stamp text, sha256 text)")
        database.execute("create table if not exists scans (key text primary key, scan text)")

    def digest(self, path: Path) -> str:
        """sha256 of a file; MISSING if it does not exist."""
        if not path.is_file():
            return MISSING
        place, status = str(path.resolve()), path.stat()
        stamp = f"{status.st_size} {status.st_mtime_ns} {status.st_ino}"
        row = self._database.execute("select sha256 from digests where path = ? and stamp = ?", (place, stamp))
        if known := row.fetchone():
            return str(known[0])
        fresh = sha256(path)
        if time.time_ns() - status.st_mtime_ns > _RACE_NS:
            self._database.execute("insert or replace into digests values (?, ?, ?)", (place, stamp, fresh))
        return fresh

    def scan(self, key: str, make: Callable[[], Scan]) -> Scan:
        """The cached scan of a key; computed with `make` and cached if there is none."""
        if known := self._database.execute("select scan from scans where key = ?", (key,)).fetchone():
            fields = json.loads(known[0])
            return Scan(fields["count"], fields["images"], tuple(fields["marks"]), tuple(fields["beside"]))
        fresh = make()
        self._database.execute("insert or replace into scans values (?, ?)", (key, json.dumps(asdict(fresh))))
        return fresh


@contextmanager
def _scan_cache(cache: Path) -> Iterator[_ScanCache]:
    cache.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(cache / "raw.sqlite", timeout=120, isolation_level=None)) as database:
        database.execute("pragma synchronous = off")  # after a power cut files are scanned again
        yield _ScanCache(database)
