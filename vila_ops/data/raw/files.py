"""The raw files of a source with their digests and scans. A file is read again only if it has changed."""

import json
import logging
import os
import sqlite3
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from zlib import crc32

from vila_ops.artifacts.disk import CACHE, make_folder
from vila_ops.config import Config, fingerprint
from vila_ops.data.raw.known import MISSING, hashes, known, sha256_of, version_of
from vila_ops.data.raw.objects import Listings, ObjectPath, changed, raw_path
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
AT_ONCE = 16
"""Objects that are hashed at the same time: most of their time is waiting."""
TOGETHER = 1024
"""Files whose versions are in memory together."""
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
    known: bytes = b""
    """Hashes by which `raw.known` notices that one of these files changed."""


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

    def file(self) -> Path:
        """The path of the raw file."""
        return raw_path(self.path)


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
    if isinstance(root, ObjectPath):
        for name, path in root.below():
            if not any(part.startswith(".") for part in name.split("/")) and not name.endswith(UNFINISHED):
                yield name, path
        return
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
            (own,) = cached.seen([path])
            key = f"{kind}:{SCAN_REVISION}:{path}:{own.digest}"  # the path too: paths of other files may depend on it
            result = cached.scan(key, lambda path=path, own=own: _unchanged(scan, path, own))  # type: ignore[misc]
            told = [hashes(str(path), own.digest, own.version)]
            beside = []
            for other, seen in zip(result.beside, cached.seen(map(raw_path, result.beside)), strict=True):
                told.append(hashes(other, seen.digest, seen.version))
                beside.append([PurePosixPath(other).name, seen.digest])
            scanned.append(
                RawFile(
                    name=name,
                    path=str(path),
                    digest=fingerprint([own.digest, beside]) if beside else own.digest,
                    count=result.count,
                    images=result.images,
                    marks=result.marks,
                    beside=len(beside),
                    beside_missing=sum(digest == MISSING for _, digest in beside),
                    known=b"".join(told),
                )
            )
    return scanned


def _unchanged(scan: Callable[[Path], Scan], path: Path, own: "FileState") -> Scan:
    """The scan of a file whose digest is known. Raises RawChanged if it is of another version by then."""
    result = scan(path)
    if own.version is not None and version_of(raw_path(str(path))) != own.version:
        raise changed(path)
    return result


def on_disk(path: Path) -> Path:
    """The path, or else the existing file of the same name in another Unicode form: macOS writes NFD, others NFC."""
    if str(path).isascii() or path.exists():
        return path
    if isinstance(path, ObjectPath):
        others = (ObjectPath(unicodedata.normalize(form, str(path))) for form in ("NFC", "NFD"))
        return next((other for other in others if other.is_file()), path)
    place = Path(path.anchor)
    for part in path.parts[bool(path.anchor) :]:
        forms = [part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD"))]
        short = (form for form in forms if len(os.fsencode(form)) <= MAX_NAME_BYTES)
        place = next((place / form for form in short if (place / form).exists()), place / part)
    return place


def content(place: Path, *, most: int) -> bytes | None:
    """The content of a file that a record names, None if there is none; of a longer file the first `most` + 1 bytes.

    Raises RawChanged if it is not the file that was scanned.
    """
    path = on_disk(place)
    if isinstance(path, ObjectPath):
        data = path.first_bytes(most + 1)
    elif path.is_file():
        with path.open("rb") as file:
            data = file.read(most + 1)
    else:
        data = None
    if data is not None and len(data) > most:
        known().check(str(place))
    else:
        known().check_content(str(place), data)
    return data


class FileState(NamedTuple):
    """A file as it was seen."""

    digest: str
    """sha256 of its content, or MISSING."""
    version: str | None
    """See `known.version_of`; None if there is no file, or if it is so young that it may change and state the same."""


class _ScanCache:
    """Digests by path, size and times, and scans by digest, in one SQLite file that many processes may share.

    A row whose checksum is wrong counts as missing, and a damaged file is replaced by an empty one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._database: sqlite3.Connection | None = None
        self._listings = Listings()

    def seen(self, paths: Iterable[Path]) -> Iterator[FileState]:
        """What is known of each file, in order; those that are new or changed are hashed."""
        left = iter(paths)
        while some := [on_disk(path) for path in islice(left, TOGETHER)]:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                asked = pool.map if any(isinstance(path, ObjectPath) for path in some) else map
                self._listings.look_up(some)
                versions = list(asked(version_of, some))
                kept = [self._digest(path, version) for path, version in zip(some, versions, strict=True)]
                new = [path for path, digest in zip(some, kept, strict=True) if digest is None]
                fresh = dict(zip(new, asked(sha256_of, new), strict=True))
            for path, version, digest in zip(some, versions, kept, strict=True):
                settled = version if version is not None and _is_settled(path) else None
                if digest is None and settled is not None:
                    self._put(_key(path), f"{version}:{fresh[path]}")
                yield FileState(fresh[path] if digest is None else digest, settled)

    def _digest(self, path: Path, version: str | None) -> str | None:
        """The digest of this version of a file; None if it is not known."""
        if version is None:
            return MISSING
        then, _, digest = (self._get(_key(path)) or "").rpartition(":")
        return digest if then == version else None

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


def _key(path: Path) -> str:
    return f"digest {path.absolute()}"


def _is_settled(path: Path) -> bool:
    """Whether another content would be another version. Objects are named by their content."""
    if isinstance(path, ObjectPath):
        return True
    status = path.stat()
    return time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > _RACE_NS


def _checksum(key: bytes, value: object) -> int:
    return crc32(key + str(value).encode("utf-8", "surrogateescape"))


@contextmanager
def _scan_cache(cache: Path) -> Iterator[_ScanCache]:
    make_folder(cache, setting=CACHE)
    with closing(_ScanCache(cache / "raw.sqlite")) as opened:
        yield opened
