"""The raw files of a source with their digests and scans. A file is read again only if it has changed."""

import json
import logging
import os
import sqlite3
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from zlib import crc32

from vila_ops.artifacts.disk import CACHE, make_folder, sha256
from vila_ops.config import Config, fingerprint
from vila_ops.data.raw.text import fault

Folders = Mapping[str, Path]
"""The folders of a source's packages, by package name; empty for a source of files."""
STRIDE = 16
"""Spans start at multiples of this; the offsets of these records in a file are its marks."""
SCAN_REVISION = 4
"""Raised if a format's scan returns other values for the same file."""
UNFINISHED = (".part", ".tmp", ".partial", ".crdownload")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".7z")
MAX_NAME_BYTES = 255
"""Limit of file systems for the name of one file or folder."""
MISSING = "missing"
"""Stands for the digest of a file that does not exist."""
_RACE_NS = 2 * 10**9
"""A file younger than this may change again under the same time stamps, so its digest is not cached."""
_NO_DAMAGE = (
    sqlite3.SQLITE_PERM, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_AUTH,
)  # fmt: skip
"""Errors of SQLite for which the content of its file is not the reason."""
log = logging.getLogger(__name__)


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
    """Name and path of the files of a format: the file itself, or those below a folder, sorted.

    Raises RawMissing if there are none, and ValueError if one would be left out: a link whose target is missing, or a
    file that is compressed in another form.
    """
    if root.is_file():
        return [(root.name, root)]
    if not root.is_dir():
        raise RawMissing(f"no such file or folder: {root} (looked for in {Path.cwd()})")
    kept = {}
    for name, path in files_below(root):
        if not path.is_file():
            _check_link(path, suffixes)
        elif name.lower().endswith(suffixes):
            kept[name] = path
        elif (stem := _uncompressed(name.lower())) is not None and stem.endswith(suffixes):
            raise ValueError(f"{path} is compressed in a form that is not read here; unpack it, or move it elsewhere")
    if not kept:
        raise RawMissing(f"{root} has no file that ends in {' or '.join(suffixes)}")
    if bad := [name for name in kept if fault(name)]:
        raise ValueError(f"{root} has a file whose name is not UTF-8: {bad[0]!r}; rename it")
    return sorted(kept.items())


def files_below(root: Path) -> Iterator[tuple[str, Path]]:
    """Name and path of everything below a folder but folders, hidden and unfinished files; in no order.

    Links to folders are followed, and each folder is listed once, under its own name rather than that of a link.
    Raises ValueError for a link to a folder above, and OSError for a folder that cannot be listed.
    """
    above = Path(os.path.realpath(root)).parents
    folders, links, listed = [("", root)], list[tuple[str, Path]](), set[str]()
    while folders or links:
        prefix, folder = folders.pop() if folders else links.pop(0)
        place = os.path.realpath(folder)
        if Path(place) in above:
            raise ValueError(f"{folder} is a link to {place}, the folder that it is in; remove the link")
        if place in listed:
            continue
        listed.add(place)
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    (links if entry.is_symlink() else folders).append((f"{prefix}{entry.name}/", Path(entry.path)))
                elif not entry.name.endswith(UNFINISHED):
                    yield prefix + entry.name, Path(entry.path)


def _check_link(path: Path, suffixes: tuple[str, ...]) -> None:
    """Raise ValueError for a link without its target that stands for a file of the format, or for a folder."""
    if path.is_symlink() and (path.name.lower().endswith(suffixes) or not path.suffix):
        raise RawMissing(
            f"{path} is a link to {os.readlink(path)}, which is missing; bring it back (`dvc checkout`, "
            f"`git annex get`), or remove the link"
        )


def _uncompressed(name: str) -> str | None:
    """The name without the end that says how the file is compressed; None if it has no such end."""
    return next((name.removesuffix(end) for end in COMPRESSIONS if name.endswith(end)), None)


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


def on_disk(path: Path) -> Path:
    """The path, or else the existing file of the same name in another Unicode form: macOS writes NFD, others NFC."""
    if path.exists() or str(path).isascii():
        return path
    place = Path(path.anchor)
    for part in path.parts[bool(path.anchor) :]:
        forms = [part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD"))]
        short = (form for form in forms if len(os.fsencode(form)) <= MAX_NAME_BYTES)
        place = next((place / form for form in short if (place / form).exists()), place / part)
    return place


class _ScanCache:
    """Digests by path, size and times, and scans by digest, in one SQLite file that many processes may share.

    A row whose checksum is wrong counts as missing, and a damaged file is replaced by an empty one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._database: sqlite3.Connection | None = None

    def digest(self, path: Path) -> str:
        """sha256 of a file; MISSING if it does not exist."""
        path = on_disk(path)
        if not path.is_file():
            return MISSING
        key, status = f"digest {path.resolve()}", path.stat()
        stamp = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"
        then, _, known = (self._get(key) or "").partition(":")
        if then == stamp:
            return known
        fresh = sha256(path)
        if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > _RACE_NS:
            self._put(key, f"{stamp}:{fresh}")
        return fresh

    def scan(self, key: str, make: Callable[[], Scan]) -> Scan:
        """The cached scan of a key; computed with `make` and cached if there is none."""
        if known := self._get(f"scan {key}"):
            fields = json.loads(known)
            return Scan(fields["count"], fields["images"], tuple(fields["marks"]), tuple(fields["beside"]))
        fresh = make()
        self._put(f"scan {key}", json.dumps(asdict(fresh)))
        return fresh

    def close(self) -> None:
        """Close the file."""
        if self._database is not None:
            self._database.close()
            self._database = None

    def _get(self, key: str) -> str | None:
        encoded = os.fsencode(key)
        for value, checksum in self._run("select value, checksum from kept where key = ?", encoded):
            if checksum == _checksum(encoded, value):
                return str(value)
        return None

    def _put(self, key: str, value: str) -> None:
        encoded = os.fsencode(key)
        self._run("insert or replace into kept values (?, ?, ?)", encoded, value, _checksum(encoded, value))

    def _run(self, statement: str, *values: object) -> list[tuple[object, object]]:
        """The rows of a statement. A damaged file is removed, and the statement is run again."""
        for _ in range(3):  # another process may be at work on the file that is removed here
            try:
                return self._rows(statement, values)
            except sqlite3.DatabaseError as error:
                if getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF in _NO_DAMAGE:
                    text = f"{self._path} cannot be used ({error}); free space there, or set resources.storage.cache"
                    raise OSError(text) from error
                log.warning("%s is damaged (%s): it is replaced, and raw files are read again", self._path, error)
                self.close()
                for path in (self._path, Path(f"{self._path}-journal")):
                    path.unlink(missing_ok=True)
        raise OSError(f"{self._path} is damaged again and again; look at the disk that holds it")

    def _rows(self, statement: str, values: tuple[object, ...]) -> list[tuple[object, object]]:
        if self._database is None:
            self._database = sqlite3.connect(self._path, timeout=120, isolation_level=None)
            self._database.execute("pragma synchronous = off")  # after a power cut files are scanned again
            self._database.execute("create table if not exists kept (key blob primary key, value text, checksum int)")
        return self._database.execute(statement, values).fetchall()


def _checksum(key: bytes, value: object) -> int:
    return crc32(key + str(value).encode("utf-8", "surrogateescape"))


@contextmanager
def _scan_cache(cache: Path) -> Iterator[_ScanCache]:
    make_folder(cache, setting=CACHE)
    with closing(_ScanCache(cache / "raw.sqlite")) as opened:
        yield opened
