"""A store on S3. An object appears by one conditional put; files are read from verified copies on this machine.

An attempt is written in the folder of its own copy, so that an artifact that was sealed here is not downloaded.
"""

import hashlib
import io
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, TypeVar

from botocore.exceptions import ClientError

from vila_ops.artifacts import disk
from vila_ops.artifacts.backend import AT_ONCE, Entry, FileFacts, Versioned
from vila_ops.artifacts.copies import copy_of, draft, one_at_a_time
from vila_ops.artifacts.s3_calls import (
    NO_KEY,
    PART_BYTES,
    TRANSFER,
    again,
    client,
    code_of,
    get,
    place,
    put,
    translated,
    whole,
)
from vila_ops.errors import DamagedFile, OtherBytes, UnsafeStore

CHUNK_BYTES = 2**20
T = TypeVar("T")
WAY_OUT = "use a store whose PutObject honours If-None-Match and If-Match (AWS and MinIO do), or a folder as the store"


def read(uri: str) -> bytes | None:
    """The bytes of an object; None if it does not exist."""
    version = get(uri)
    return None if version is None else version.data


def create(uri: str, data: bytes) -> bool:
    """Put an object only if none exists (If-None-Match: *)."""
    return put(uri, data, {"IfNoneMatch": "*"}) is not None


def load(uri: str) -> Versioned | None:
    """The content of a register and its ETag; None if it does not exist."""
    return get(uri)


def swap(uri: str, data: bytes, tag: str | None) -> str | None:
    """Replace the object with this ETag (If-Match; None: create it); None if its ETag is another by now."""
    return put(uri, data, {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag})


def begin(uri: str) -> Path:
    """A new local folder, at the path of the attempt's copy."""
    attempt = copy_of(uri)
    attempt.mkdir(parents=True)
    return attempt


def publish(attempt: Path, uri: str) -> None:
    """Upload every file of the local folder."""

    def upload(path: Path) -> None:
        with path.open("rb") as file:
            _send(file, f"{uri}/{path.relative_to(attempt)}")

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(upload, [path for path in sorted(attempt.rglob("*")) if path.is_file()]))


def discard(attempt: Path, uri: str) -> None:
    """Remove an attempt whose address was sealed by another one: its objects and its local folder."""
    remove(uri)
    shutil.rmtree(attempt)


def names(uri: str) -> list[str]:
    """Names of all objects below a place, relative to it."""
    return [entry.name for entry in entries(uri)]


def entries(uri: str) -> list[Entry]:
    """All objects below a place."""
    bucket, prefix = place(f"{uri}/").values()
    with translated(uri):
        pages = client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [
            Entry(item["Key"].removeprefix(prefix), item["Size"], changed=written, arrived=written)
            for page in pages
            for item in page.get("Contents", [])
            for written in [item["LastModified"].timestamp()]
        ]


def remove(uri: str) -> None:
    """Remove the object at a place and all objects below it."""
    for target in (uri, *(f"{uri}/{name}" for name in names(uri))):
        with translated(target):
            client().delete_object(**place(target))


def write(uri: str, chunks: Iterable[memoryview]) -> None:
    """Put an object from an iterable of chunks, or replace it."""
    _send(io.BufferedReader(_Chunks(chunks), PART_BYTES), uri)


class _Chunks(io.RawIOBase):
    """An iterable of chunks as a file that is read once."""

    def __init__(self, chunks: Iterable[memoryview]) -> None:
        self.chunks, self.rest = iter(chunks), memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.rest:
            try:
                self.rest = next(self.chunks)
            except StopIteration:
                return 0
        size = min(len(buffer), len(self.rest))
        buffer[:size], self.rest = self.rest[:size], self.rest[size:]
        return size


def _send(file: IO[bytes], uri: str) -> None:
    """Upload an open file. S3 compares each part with its sha256."""
    sent = {"ExtraArgs": {"ChecksumAlgorithm": "SHA256"}, "Config": TRANSFER}
    with translated(uri):
        client().upload_fileobj(file, **place(uri), **sent)


def sizes(uris: Sequence[str]) -> list[int | None]:
    """Size of each object in bytes; None for a missing one."""

    def size(uri: str) -> int | None:
        with translated(uri):
            try:
                return int(client().head_object(**place(uri))["ContentLength"])
            except ClientError as error:
                if code_of(error) in NO_KEY:
                    return None
                raise

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(size, uris))


def digest(uri: str, expected: FileFacts) -> str:
    """sha256 of an object, streamed and not kept, read again where it differs from the expected one.

    Raises DamagedFile for a missing object.
    """
    actual = ""

    def once() -> None:
        nonlocal actual
        hashed = hashlib.sha256()
        body = client().get_object(**place(uri))["Body"]
        with whole():
            for chunk in body.iter_chunks(CHUNK_BYTES):
                hashed.update(chunk)
        actual = hashed.hexdigest()
        if actual != expected["sha256"]:
            raise OtherBytes("the sha256 differs")

    with translated(uri), suppress(OtherBytes):
        try:
            again(once)
        except ClientError as error:
            if code_of(error) in NO_KEY:
                raise DamagedFile(uri, "is missing") from error
            raise
    return actual


def check(uri: str, facts: FileFacts) -> None:
    """Compare an object with its sha256; it is streamed and not kept. Raises DamagedFile."""
    actual = digest(uri, facts)
    if actual != facts["sha256"]:
        raise DamagedFile(uri, f"has sha256 {actual[:12]}..., sealed as {facts['sha256'][:12]}...")


def fetch(uri: str, facts: FileFacts) -> None:
    """Download an object of which there is no local copy of its size."""
    path = copy_of(uri)
    if not path.is_file() or path.stat().st_size != facts["size"]:
        local(uri, facts)


def local(uri: str, facts: FileFacts) -> Path:
    """The local copy of an object, downloaded if it is missing or damaged.

    An existing copy is hashed once per process. Processes that need the same object wait for one download.
    """
    path = copy_of(uri)
    with one_at_a_time(uri):
        if not _is_as_sealed(path, facts):
            fresh = draft()
            _download(uri, facts, fresh)
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(fresh, path)
    return path


def folder(uri: str, files: Mapping[str, tuple[str, FileFacts]]) -> Path:
    """The local copy of an attempt's folder; files of other artifacts are hard-linked into it."""
    whole_folder = copy_of(uri)
    whole_folder.mkdir(parents=True, exist_ok=True)

    def fetch(name: str) -> None:
        path, target = local(*files[name]), whole_folder / name
        if path != target and not (target.exists() and path.samefile(target)):
            target.parent.mkdir(parents=True, exist_ok=True)
            fresh = draft()
            disk.link(path, fresh)
            os.replace(fresh, target)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(fetch, files))
    return whole_folder


def copy(uri: str, facts: FileFacts, target: Path) -> None:
    """Copy an object to `target`, from its local copy where that is sound."""
    path = copy_of(uri)
    if _is_as_sealed(path, facts):
        shutil.copyfile(path, target)
    else:
        _download(uri, facts, target)


def sharing(uri: str, root: str, kinds: Iterable[str]) -> list[str]:
    """The folder ROOT/KIND/KEY of an object. Manifests of other artifacts may point to it; those are not searched."""
    kind, key, *_ = uri.removeprefix(f"{root}/").split("/")
    return [f"{root}/{kind}/{key}"]


@lru_cache(maxsize=64)
def probe(root: str) -> str:
    """Try, with an object of its own, what sealing and leases rest on.

    Raises UnsafeStore, StoreRefused, StoreUnreachable.
    """
    uri = f"{root}/.probe/{secrets.token_hex(8)}"
    first = _expect(put(uri, b"first", {"IfNoneMatch": "*"}), root, "refuses If-None-Match for a key without an object")
    try:
        if put(uri, b"second", {"IfNoneMatch": "*"}) is not None:
            raise UnsafeStore(
                f"store {root} ignores If-None-Match: a second put overwrote the first, so a sealed artifact could "
                f"change, and the later of two processes that seal one address would win; {WAY_OUT}"
            )
        _expect(get(uri) == Versioned(b"first", first), root, "does not read back an object that was just put")
        second = _expect(put(uri, b"second", {"IfMatch": first}), root, "refuses If-Match with the object's own ETag")
        if put(uri, b"third", {"IfMatch": first}) is not None:
            raise UnsafeStore(f"store {root} ignores If-Match: two processes could hold one lease; {WAY_OUT}")
        _expect(get(uri) == Versioned(b"second", second), root, "does not read back an object that was just replaced")
    finally:
        with translated(uri):
            client().delete_object(**place(uri))
    return f"store {root}: conditional puts are honoured, and objects are read back as they were put"


def timed(root: str, data: bytes) -> tuple[float, float]:
    """Seconds of putting an object of its own and of reading it back. Raises StoreRefused, StoreUnreachable."""
    uri = f"{root}/.probe/{secrets.token_hex(8)}"
    try:
        started = time.perf_counter()
        put(uri, data, {"IfNoneMatch": "*"})
        wrote = time.perf_counter() - started
        started = time.perf_counter()
        read(uri)
        return wrote, time.perf_counter() - started
    finally:
        with translated(uri):
            client().delete_object(**place(uri))


def _expect(outcome: T | None, root: str, fault: str) -> T:
    """The outcome of a step of `probe`. Raises UnsafeStore where it failed."""
    if not outcome:
        raise UnsafeStore(f"store {root} {fault}; {WAY_OUT}")
    return outcome


def _download(uri: str, facts: FileFacts, target: Path) -> None:
    """Download an object to `target`. Raises DamagedFile where it is missing or its sha256 differs at every try."""

    def once() -> None:
        with target.open("wb") as file, whole():
            client().download_fileobj(**place(uri), Fileobj=file, Config=TRANSFER)
        if disk.sha256(target) != facts["sha256"]:
            raise OtherBytes(f"sha256 {facts['sha256'][:12]}...")

    with translated(uri):
        try:
            again(once)
        except OtherBytes as error:
            raise DamagedFile(uri, f"holds other bytes than were sealed ({error})") from error
        except ClientError as error:
            if code_of(error) in NO_KEY:
                raise DamagedFile(uri, "is missing") from error
            raise


def _is_as_sealed(path: Path, facts: FileFacts) -> bool:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return False
    return stat.st_size == facts["size"] and disk.known_sha256(path) == facts["sha256"]
