"""Raw files in object stores, as paths: s3://bucket/key, gs://bucket/key, az://container/key.

An object is read in ranges of one version (pinned by If-Match), again with growing waits where an answer fails or
breaks off, and never as a whole copy. s3fs is the layer for S3, obstore for the others (`clouds.py`). Credentials,
region and endpoint come from the environment; for S3 by botocore's chain, as for `resources.storage.store`.
"""

import errno
import io
import os
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PosixPath
from typing import Any, BinaryIO, NamedTuple, cast

from vila_ops.errors import RawChanged, RawRefused, StoreUnreachable, VilaError

SCHEMES = ("s3", "gs", "az")
"""Schemes that are read."""
FIRST_BYTES, BLOCK_BYTES = 2**18, 4 * 2**20
"""Bytes of the first range of a reader, which holds one at a time, and the most bytes that are read ahead."""
BUFFER_BYTES = 2**16
LIST_FROM = 64
"""Objects of one folder from which on they are looked up by one listing, and not by a call for each."""
KEPT_LISTINGS = 8
TRIES = 6
CONNECT_SECONDS, READ_SECONDS = 10.0, 60.0
CONNECTIONS = 64
PRECONDITION_FAILED = 412
MAY_PASS = (408, 409, 429)
"""Status codes below 500 that the next try may not meet."""


class ObjectVersion(NamedTuple):
    """What a store says of an object."""

    size: int
    """Bytes."""
    tag: str
    """The ETag: another one for other content, and perhaps for the same content that was uploaded again."""


class ObjectPath(PosixPath):
    """An object, or the folder of those below a prefix. It reads the version that it asked for first."""

    _entry: ObjectVersion | None

    def __str__(self) -> str:
        is_whole = self.parts[:1] in [(f"{scheme}:",) for scheme in SCHEMES]
        return f"{self.scheme}://{self.key}" if is_whole else super().__str__()  # a part of a path is relative

    @property
    def scheme(self) -> str:
        """s3, gs or az."""
        return self.parts[0].removesuffix(":")

    @property
    def key(self) -> str:
        """BUCKET/KEY."""
        return "/".join(self.parts[1:])

    def entry(self) -> ObjectVersion | None:
        """The version that this path reads, asked for once; None if there is no object."""
        if "_entry" not in self.__dict__:
            info = self._info()
            self._entry = None if info is None or info["type"] != "file" else _entry_of(info, str(self))
        return self._entry

    def below(self) -> Iterator[tuple[str, "ObjectPath"]]:
        """Name and path of every object below the prefix. Raises ValueError for a key that is no path."""
        with translated(str(self)):
            infos = self._files.find(str(self), detail=True).values()
        for info in infos:
            name = info["name"].removeprefix(f"{self.key}/")
            if info["type"] != "file" or name.endswith("/"):  # the marker of a folder
                continue
            if {"", ".", ".."} & set(name.split("/")):
                raise ValueError(f"{self}: the key {info['name']!r} has an empty part or dots as one; rename it")
            path = self / name
            path._entry = _entry_of(info, str(path))
            yield name, path

    def entries(self) -> dict[str, ObjectVersion]:
        """The versions of the objects in this folder, without those of folders in it, by name."""
        with translated(str(self)):
            try:
                infos = self._files.ls(str(self), detail=True)
            except FileNotFoundError:
                return {}
        files = {info["name"].rpartition("/")[2]: info for info in infos if info["type"] == "file"}
        return {name: _entry_of(info, f"{self}/{name}") for name, info in files.items() if name}

    def first_bytes(self, most: int) -> bytes | None:
        """The first `most` bytes; None if there is no object. A small object is one answer, so of one version."""
        entry = self.entry()
        if entry is None:
            return None
        if entry.size > most:
            with self.open("rb") as file:
                return file.read(most)
        with translated(str(self)), _still_there(str(self)):  # without a range: there are stores that refuse a long one
            return bytes(self._files.cat_file(str(self), max_concurrency=1))

    def write(self, source: Path) -> None:
        """Upload a file of this machine, in place of an object that is there."""
        with translated(str(self)):
            self._files.put_file(str(source), str(self))
        self.__dict__.pop("_entry", None)

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object. Raises FileNotFoundError unless `missing_ok`."""
        if not self.is_file() and not missing_ok:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        with translated(str(self)):
            self._files.rm_file(str(self))
        self.__dict__.pop("_entry", None)

    def open(  # type: ignore[override]
        self, mode: str = "r", buffering: int = -1, encoding: None = None, errors: None = None, newline: None = None
    ) -> BinaryIO:
        """The object's bytes. Raises RawChanged if this path has another version by now."""
        if mode != "rb":
            raise ValueError(f"{self} is opened with {mode!r}; an object is read as bytes (`rb`)")
        return cast(BinaryIO, io.BufferedReader(_Ranges(self), BUFFER_BYTES))

    def read_bytes(self) -> bytes:
        """All of its bytes."""
        with self.open("rb") as file:
            return file.read()

    def exists(self) -> bool:
        """Whether there is such an object, or one below it."""
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        """Whether there is such an object."""
        return self.entry() is not None

    def is_dir(self) -> bool:
        """Whether an object is below it."""
        info = self._info()
        return info is not None and info["type"] == "directory"

    def is_symlink(self) -> bool:
        """Never."""
        return False

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Kind and size alone. Raises FileNotFoundError."""
        entry = self.entry()
        if entry is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return os.stat_result((stat.S_IFREG | 0o444, 0, 0, 1, 0, 0, entry.size, 0, 0, 0))

    def resolve(self, strict: bool = False) -> "ObjectPath":
        """Itself: a URI is absolute and has no links."""
        return self

    def absolute(self) -> "ObjectPath":
        """Itself."""
        return self

    @property
    def _files(self) -> Any:
        return filesystem(self.scheme, os.getpid())

    def _info(self) -> dict[str, Any] | None:
        with translated(str(self)):
            try:
                return dict(self._files.info(str(self)))
            except FileNotFoundError:
                return None


class _Ranges(io.RawIOBase):
    """One version of an object as a file. A range that follows the one before is twice as long, up to BLOCK_BYTES."""

    def __init__(self, path: ObjectPath) -> None:
        self._uri = str(path)
        expected = path.entry()
        if expected is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._uri)
        with translated(self._uri), _still_there(self._uri):
            self._file = path._files.open(self._uri, "rb", cache_type="none")
        if _entry_of(self._file.details, self._uri) != expected:
            raise changed(self._uri)
        self._size = expected.size
        self._place = self._start = 0
        self._range, self._ahead = b"", FIRST_BYTES

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError(f"seek to byte {start + offset}")
        self._place = start + offset
        return self._place

    def readinto(self, buffer: Any) -> int:
        if self._place >= self._size:
            return 0
        end = self._start + len(self._range)
        if not self._start <= self._place < end:
            follows = self._range and end <= self._place <= end + self._ahead
            self._ahead = min(2 * self._ahead, BLOCK_BYTES) if follows else FIRST_BYTES
            self._range, self._start = self._read(max(len(buffer), self._ahead)), self._place
        skipped = self._place - self._start
        data = memoryview(self._range)[skipped : skipped + len(buffer)]
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)

    def _read(self, size: int) -> bytes:
        """The next bytes, at least one of them."""
        with translated(self._uri), _still_there(self._uri):
            self._file.seek(self._place)
            data = bytes(self._file.read(min(size, self._size - self._place)))
        if not data:
            raise StoreUnreachable(
                f"{self._uri}: the store sent nothing for byte {self._place} of {self._size}; run again"
            )
        return data


def raw_path(place: str) -> Path:
    """The path of a raw file or folder that a setting names. Raises ValueError for a URI without a bucket."""
    scheme, mark, rest = place.partition("://")
    if not mark or scheme not in SCHEMES:
        return Path(place)
    if not rest.strip("/"):
        raise ValueError(f"{place!r} names no bucket; write {scheme}://BUCKET/FOLDER")
    return ObjectPath(place)


def raw_path_in(folder: Path, place: str) -> Path:
    """As `raw_path`, of a place that a command in this folder would find."""
    path = raw_path(place)
    return path if isinstance(path, ObjectPath) else folder / path


def for_arrow(path: Path) -> Any:
    """What pyarrow reads at a path: the path itself, or the opened object."""
    return path.open("rb") if isinstance(path, ObjectPath) else path


class Listings:
    """Listings of folders, each made once, when many of its objects are asked for together."""

    def __init__(self) -> None:
        self._kept: dict[ObjectPath, dict[str, ObjectVersion]] = {}

    def look_up(self, paths: Iterable[Path]) -> None:
        """Learn the versions of those paths that are objects in a folder that is listed."""
        by_folder: dict[ObjectPath, list[ObjectPath]] = defaultdict(list)
        for path in paths:
            if isinstance(path, ObjectPath) and "_entry" not in path.__dict__:
                by_folder[path.parent].append(path)
        for folder, own in by_folder.items():
            if folder not in self._kept and len(own) >= LIST_FROM:
                if len(self._kept) == KEPT_LISTINGS:
                    del self._kept[next(iter(self._kept))]
                self._kept[folder] = folder.entries()
            if folder in self._kept:
                for path in own:
                    path._entry = self._kept[folder].get(path.name)


def changed(place: object) -> RawChanged:
    """The error for a raw file that is another one than at first."""
    return RawChanged(
        f"{place} changed or vanished after it was first read, and before all of its records were; nothing was sealed "
        f"from it: let writers of raw data finish, and run again to take it as it is then"
    )


@lru_cache(maxsize=8)
def filesystem(scheme: str, process: int) -> Any:
    """The file system of a scheme, for all threads of a process; without a cache of listings."""
    if scheme != "s3":
        from vila_ops.data.raw.clouds import CloudFiles

        return CloudFiles(scheme, tries=TRIES, connect_seconds=CONNECT_SECONDS, read_seconds=READ_SECONDS)
    import fsspec

    retries = {"mode": "standard", "total_max_attempts": TRIES}
    waits = {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS}
    config = {"retries": retries, "max_pool_connections": CONNECTIONS, **waits}
    return fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True, config_kwargs=config)


@contextmanager
def translated(uri: str) -> Iterator[None]:
    """Translate the errors of a call about `uri`, FileNotFoundError and those of `clouds.py` apart.

    Raises RawRefused, StoreUnreachable, RawChanged.
    """
    import aiohttp
    from botocore.exceptions import BotoCoreError, ClientError
    from s3fs.utils import FileExpired

    from vila_ops.artifacts.s3_calls import BAD_CREDENTIALS

    try:
        yield
    except (FileNotFoundError, VilaError):
        raise
    except FileExpired as error:
        raise changed(uri) from error
    except (PermissionError, *BAD_CREDENTIALS) as error:
        raise RawRefused(
            f"{uri}: access refused ({error}); check that the credentials (AWS_ACCESS_KEY_ID and "
            f"AWS_SECRET_ACCESS_KEY, or AWS_PROFILE) are right and may read and list there"
        ) from error
    except (OSError, BotoCoreError, ClientError, aiohttp.ClientError, TimeoutError) as error:
        code, status = _answer(error)
        if status == PRECONDITION_FAILED:
            raise changed(uri) from error
        if status and status < 500 and status not in MAY_PASS:
            raise RawRefused(f"{uri}: the store answers {code} ({status}); check region and endpoint") from error
        raise StoreUnreachable(
            f"{uri}: the store did not answer as it should ({code or type(error).__name__}, {TRIES} tries); check that "
            f"it is up and reachable, and run again"
        ) from error


@contextmanager
def _still_there(uri: str) -> Iterator[None]:
    """Translate a missing object, which was there before. Raises RawChanged."""
    try:
        yield
    except FileNotFoundError as error:
        raise changed(uri) from error


def _answer(error: BaseException) -> tuple[str, int]:
    """S3's name and the status of an error that s3fs translated; empty and 0 for others."""
    answer = getattr(error.__cause__ or error, "response", None)
    if not isinstance(answer, dict) or "Error" not in answer:
        return "", 0
    return str(answer["Error"]["Code"]), int(answer["ResponseMetadata"]["HTTPStatusCode"])


def _entry_of(info: dict[str, Any], uri: str) -> ObjectVersion:
    """The entry of fsspec's `info`. Raises ValueError if the store gives the object no ETag."""
    if not info.get("ETag"):
        raise ValueError(f"{uri}: the store gives no ETag, which tells a change; copy the data to another store")
    return ObjectVersion(int(info["size"]), str(info["ETag"]))
