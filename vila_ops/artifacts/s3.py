"""A store on S3. What is created is created by one conditional put; files lie on this machine as verified copies.

An attempt is made in the very folder that its copy would have, so that what was sealed here need not be fetched.
"""

import hashlib
import io
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, TypeVar

from botocore.exceptions import ClientError

from vila_ops.artifacts import disk
from vila_ops.artifacts.backend import AT_ONCE, FileFacts, Versioned
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
    told,
    whole,
)
from vila_ops.errors import DamagedFile, OtherBytes, UnsafeStore

CHUNK_BYTES = 2**20
T = TypeVar("T")
WAY_OUT = "use a store whose PutObject honours If-None-Match and If-Match (AWS and MinIO do), or a folder as the store"


def read(uri: str) -> bytes | None:
    """The bytes of an object; None where there is none."""
    found = get(uri)
    return None if found is None else found.data


def create(uri: str, data: bytes) -> bool:
    """Put an object only where there is none (If-None-Match: *)."""
    return put(uri, data, {"IfNoneMatch": "*"}) is not None


def load(uri: str) -> Versioned | None:
    """What a register holds, and its ETag."""
    return get(uri)


def swap(uri: str, data: bytes, tag: str | None) -> str | None:
    """Replace the object with this ETag (If-Match; None: make it); None if it is another one by now."""
    return put(uri, data, {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag})


def begin(uri: str) -> Path:
    """A fresh local folder, where the copy of the attempt will have been."""
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
    """Remove an attempt that came second: its objects and its local folder."""
    remove(uri)
    shutil.rmtree(attempt)


def names(uri: str) -> list[str]:
    """Names of all objects below a place, relative to it."""
    bucket, prefix = place(f"{uri}/").values()
    with told(uri):
        pages = client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [found["Key"].removeprefix(prefix) for page in pages for found in page.get("Contents", [])]


def remove(uri: str) -> None:
    """Remove the object at a place and all objects below it, where there are any."""
    for target in (uri, *(f"{uri}/{name}" for name in names(uri))):
        with told(target):
            client().delete_object(**place(target))


def write(uri: str, chunks: Iterable[memoryview]) -> None:
    """Put an object of chunks that are made one after another; replaces what is there."""
    _send(io.BufferedReader(_Chunks(chunks), PART_BYTES), uri)


class _Chunks(io.RawIOBase):
    """Chunks as a file that is read once."""

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
    """Upload an open file; each part is sent with its sha256."""
    sent = {"ExtraArgs": {"ChecksumAlgorithm": "SHA256"}, "Config": TRANSFER}
    with told(uri):
        client().upload_fileobj(file, **place(uri), **sent)


def sizes(uris: Sequence[str]) -> list[int | None]:
    """Bytes of each object, None for one that is not there."""

    def size(uri: str) -> int | None:
        with told(uri):
            try:
                return int(client().head_object(**place(uri))["ContentLength"])
            except ClientError as error:
                if code_of(error) in NO_KEY:
                    return None
                raise

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(size, uris))


def digest(uri: str, expected: FileFacts) -> str:
    """sha256 of an object, streamed and not kept; read again where it is not the expected one.

    Raises DamagedFile where there is none.
    """
    seen = ""

    def once() -> None:
        nonlocal seen
        hashed = hashlib.sha256()
        body = client().get_object(**place(uri))["Body"]
        with whole():
            for chunk in body.iter_chunks(CHUNK_BYTES):
                hashed.update(chunk)
        seen = hashed.hexdigest()
        if seen != expected["sha256"]:
            raise OtherBytes("not those that were sealed")

    with told(uri), suppress(OtherBytes):
        try:
            again(once)
        except ClientError as error:
            if code_of(error) in NO_KEY:
                raise DamagedFile(uri, "is missing") from error
            raise
    return seen


def check(uri: str, facts: FileFacts) -> None:
    """Compare an object with its sha256; it is streamed and not kept. Raises DamagedFile."""
    found = digest(uri, facts)
    if found != facts["sha256"]:
        raise DamagedFile(uri, f"has sha256 {found[:12]}..., sealed as {facts['sha256'][:12]}...")


def local(uri: str, facts: FileFacts) -> Path:
    """The copy of an object on this machine, downloaded if it is not there or not as it was sealed.

    A copy that was there is hashed once a process. Processes that want the same one wait for one download.
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
    """The local copy of an attempt's folder; files that lie elsewhere in the store are linked into it."""
    whole_folder = copy_of(uri)
    whole_folder.mkdir(parents=True, exist_ok=True)

    def fetch(name: str) -> None:
        path, target = local(*files[name]), whole_folder / name
        if path != target and not (target.exists() and path.samefile(target)):
            target.parent.mkdir(parents=True, exist_ok=True)
            fresh = draft()
            os.link(path, fresh)
            os.replace(fresh, target)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(fetch, files))
    return whole_folder


def copy(uri: str, facts: FileFacts, target: Path) -> None:
    """An object to `target`, from the copy on this machine where there is one."""
    path = copy_of(uri)
    if _is_as_sealed(path, facts):
        shutil.copyfile(path, target)
    else:
        _download(uri, facts, target)


def sharing(uri: str, root: str, kinds: Iterable[str]) -> list[str]:
    """The folder ROOT/KIND/KEY that the object lies in; others point to it from their manifests."""
    kind, key, *_ = uri.removeprefix(f"{root}/").split("/")
    return [f"{root}/{kind}/{key}"]


@lru_cache(maxsize=64)
def probe(root: str) -> str:
    """Try, with an object of its own, what sealing and leases rest on. Raises UnsafeStore, StoreRefused."""
    uri = f"{root}/.probe/{secrets.token_hex(8)}"
    first = _expect(put(uri, b"first", {"IfNoneMatch": "*"}), root, "refuses If-None-Match where nothing is")
    try:
        if put(uri, b"second", {"IfNoneMatch": "*"}) is not None:
            raise UnsafeStore(
                f"store {root} ignores If-None-Match: a second put overwrote the first, so that what is sealed could "
                f"change, and of two processes that seal the same address the later one would win; {WAY_OUT}"
            )
        _expect(get(uri) == Versioned(b"first", first), root, "does not read back what was just put")
        second = _expect(put(uri, b"second", {"IfMatch": first}), root, "refuses If-Match with the object's own ETag")
        if put(uri, b"third", {"IfMatch": first}) is not None:
            raise UnsafeStore(f"store {root} ignores If-Match: two processes could hold one lease; {WAY_OUT}")
        _expect(get(uri) == Versioned(b"second", second), root, "does not read back what was just replaced")
    finally:
        with told(uri):
            client().delete_object(**place(uri))
    return f"store {root}: conditional puts are honoured, and what was put is read back"


def _expect(found: T | None, root: str, fault: str) -> T:
    if not found:
        raise UnsafeStore(f"store {root} {fault}; {WAY_OUT}")
    return found


def _download(uri: str, facts: FileFacts, target: Path) -> None:
    """An object's bytes to `target`. Raises CorruptArtifact where they are not, or stay other than they were sealed."""

    def once() -> None:
        with target.open("wb") as file, whole():
            client().download_fileobj(**place(uri), Fileobj=file, Config=TRANSFER)
        if disk.sha256(target) != facts["sha256"]:
            raise OtherBytes(f"sha256 {facts['sha256'][:12]}...")

    with told(uri):
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
