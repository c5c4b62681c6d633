"""The raw files of a source: which there are, what lies in them, and their digests. Each file is read for it once."""

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
"""Spans start at multiples of it, whose places in a file are noted."""
SCAN_REVISION = 1
"""Bumped when a format's scan gives other numbers for the same file."""
UNFINISHED = (".part", ".tmp", ".partial", ".crdownload")
_RACE_NS = 2 * 10**9
"""A file this young may change once more under the same time stamp: its digest is not kept."""


@dataclass(frozen=True)
class Scan:
    """What one look at a file tells."""

    count: int
    """Records, the faulty ones too."""
    images: int
    """Images of all records: what sizes shards."""
    marks: tuple[int, ...] = ()
    """Bytes before record 0, STRIDE, 2 STRIDE, ...; empty where the format finds a record by its number."""
    beside: tuple[str, ...] = ()
    """Other files that its records read: relative to the working directory, or absolute."""


class RawFile(Config):
    """One file of a source."""

    name: str
    """Relative to the source's path; the order of names is the order of records."""
    path: str
    digest: str
    """Of its bytes, and of the files beside it that its records read."""
    count: int
    images: int
    marks: tuple[int, ...]


class Thinned(Config):
    """Which records are taken where a source is limited: `limit` of `total`, evenly spaced."""

    first: int
    """Records of the source before the file."""
    total: int
    limit: int

    def takes(self, number: int) -> bool:
        """Whether record `number` of the file is one of them: places p * total // limit for p in [0, limit)."""
        place = self.first + number
        return (-(-place * self.limit // self.total)) * self.total // self.limit == place


class Span(Config):
    """Some neighbouring records of one raw file."""

    name: str
    path: str
    digest: str
    start: int
    """First record, a multiple of STRIDE."""
    stop: int
    mark: int
    """Bytes before the first record; 0 where the format finds a record by its number."""
    thinned: Thinned | None = None

    def takes(self, number: int) -> bool:
        """Whether a record of the file, by its number in it, is wanted."""
        return self.thinned is None or self.thinned.takes(number)


def paths(root: Path, suffixes: tuple[str, ...]) -> list[tuple[str, Path]]:
    """Name and path of the files of a format: the file itself, or those of a folder, sorted; no hidden or half ones."""
    if root.is_file():
        return [(root.name, root)]
    if not root.is_dir():
        raise ValueError(f"no such file or folder: {root} (looked for in {Path.cwd()})")
    found = {
        path.relative_to(root).as_posix(): path
        for path in root.rglob("*")
        if path.name.lower().endswith(suffixes) and path.is_file()
    }
    kept = {
        name: path
        for name, path in found.items()
        if not name.endswith(UNFINISHED) and not any(part.startswith(".") for part in name.split("/"))
    }
    if not kept:
        raise ValueError(f"{root} has no file that ends in {' or '.join(suffixes)}")
    return sorted(kept.items())


def scan_files(
    files: Iterable[tuple[str, Path]], kind: str, scan: Callable[[Path], Scan], *, cache: Path
) -> list[RawFile]:
    """Every file looked at once; what is known of a file that did not change is taken from the cache.

    kind: the format, with whatever a scan depends on but the file, such as the folder of images.
    """
    found = []
    with _notes(cache) as notes:
        for name, path in files:
            own = notes.digest(path)
            key = f"{kind}:{SCAN_REVISION}:{path}:{own}"  # the path too: where other files lie may follow from it
            seen = notes.scan(key, lambda path=path: scan(path))  # type: ignore[misc]
            beside = [[Path(other).name, notes.digest(Path(other))] for other in seen.beside]
            found.append(
                RawFile(
                    name=name,
                    path=str(path),
                    digest=fingerprint([own, beside]) if beside else own,
                    count=seen.count,
                    images=seen.images,
                    marks=seen.marks,
                )
            )
    return found


class _Notes:
    """Digests by path, size and time, and scans by digest, in one SQLite file that many processes may share."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        database.execute("create table if not exists digests (path text primary key, stamp text, sha256 text)")
        database.execute("create table if not exists scans (key text primary key, scan text)")

    def digest(self, path: Path) -> str:
        """sha256 of a file; "missing" where there is none."""
        if not path.is_file():
            return "missing"
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
        """The scan noted under a key, made where there is none."""
        if known := self._database.execute("select scan from scans where key = ?", (key,)).fetchone():
            said = json.loads(known[0])
            return Scan(said["count"], said["images"], tuple(said["marks"]), tuple(said["beside"]))
        fresh = make()
        self._database.execute("insert or replace into scans values (?, ?)", (key, json.dumps(asdict(fresh))))
        return fresh


@contextmanager
def _notes(cache: Path) -> Iterator[_Notes]:
    cache.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(cache / "raw.sqlite", timeout=120, isolation_level=None)) as database:
        database.execute("pragma synchronous = off")  # a power cut costs another look, nothing else
        yield _Notes(database)
