"""Objects of Google's and Azure's stores by obstore, with those calls of fsspec that `objects.py` makes.

A file reads ranges of the version that it was opened with (If-Match). Credentials and endpoints are those of the
environment.
"""

import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import obstore
from obstore.exceptions import BaseError, InvalidPathError, PreconditionError
from obstore.store import AzureStore, GCSStore

from vila_ops.config.secrets import PASSWORD, without_logins
from vila_ops.errors import RawRefused, StoreUnreachable

if TYPE_CHECKING:
    from obstore import ObjectMeta

REFUSED = (*range(400, 408), 409)
"""Status codes that the next try meets again. Azure answers 409 where an account allows no public access."""
METADATA = re.compile(r"http://(169\.254\.169\.254|metadata\.google\.internal)/")
"""Where a machine of a cloud gets its token. obstore asks there where the environment has no credentials."""
CREDENTIALS = {
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
ENDPOINTS = {
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT", "AZURITE_BLOB_STORAGE_URL"),
}
PARTS_AT_ONCE = 2
"""Of an upload. The time limit is that of a whole part of 5 MiB: with more at once a slow line would miss it."""
Store = GCSStore | AzureStore
Info = dict[str, Any]


class CloudFiles:
    """All buckets of Google's store (gs), or all containers of an account of Azure's (az)."""

    def __init__(self, scheme: str, *, tries: int, connect_seconds: float, read_seconds: float) -> None:
        self._kind: type[GCSStore] | type[AzureStore] = GCSStore if scheme == "gs" else AzureStore
        self._tries = tries
        self._connect, self._read = timedelta(seconds=connect_seconds), timedelta(seconds=read_seconds)
        self._stores: dict[str, Store] = {}

    def info(self, uri: str) -> Info:
        """What the store says of an object, or that objects are below a prefix. Raises FileNotFoundError."""
        with _translated(uri):
            store, bucket, key = self.at(uri)
            if key:
                with suppress(FileNotFoundError):
                    return file_info(bucket, obstore.head(store, key))
            if any(obstore.list(store, key or None, chunk_size=1)):
                return {"name": f"{bucket}/{key}", "type": "directory", "size": 0}
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), uri)

    def find(self, uri: str, *, detail: bool) -> dict[str, Info]:
        """Every object below a prefix, by its name."""
        with _translated(uri):
            store, bucket, key = self.at(uri)
            listed = [one for chunk in obstore.list(store, key or None) for one in chunk]
            return {one["name"]: one for one in _files(store, bucket, listed)}

    def ls(self, uri: str, *, detail: bool) -> list[Info]:
        """The objects of a folder, without those of folders in it."""
        with _translated(uri):
            store, bucket, key = self.at(uri)
            return list(_files(store, bucket, obstore.list_with_delimiter(store, key or None)["objects"]))

    def cat_file(self, uri: str, *, max_concurrency: int) -> bytes:
        """An object as one answer."""
        with _translated(uri):
            store, _, key = self.at(uri)
            return bytes(obstore.get(store, key).bytes())

    def open(self, uri: str, mode: str, *, cache_type: str) -> "CloudFile":
        """The version of an object that is there now."""
        return CloudFile(self, uri)

    def put_file(self, source: str, uri: str) -> None:
        """Upload a file of this machine."""
        with _translated(uri):
            store, _, key = self.at(uri)
            obstore.put(store, key, Path(source), max_concurrency=PARTS_AT_ONCE)

    def rm_file(self, uri: str) -> None:
        """Remove an object."""
        with _translated(uri):
            store, _, key = self.at(uri)
            obstore.delete(store, key)

    def at(self, uri: str) -> tuple[Store, str, str]:
        """The store of a URI's bucket, the bucket and the key. Raises RawRefused for variables that cannot be used."""
        bucket, _, key = uri.partition("://")[2].partition("/")
        if bucket not in self._stores:
            for name in ENDPOINTS[_scheme(uri)]:
                if PASSWORD.search(os.environ.get(name, "")):
                    raise RawRefused(
                        f"{name} holds a password; leave it out, as {CREDENTIALS[_scheme(uri)]} sign requests"
                    )
            try:
                self._stores[bucket] = self._kind(
                    bucket,
                    client_options={"allow_http": True, "connect_timeout": self._connect, "timeout": self._read},
                    retry_config={"max_retries": self._tries - 1},
                )
            except BaseError as error:
                raise _refused(uri, "no usable credentials or endpoint", error) from error
        return self._stores[bucket], bucket, key


class CloudFile:
    """One version of an object."""

    def __init__(self, files: CloudFiles, uri: str) -> None:
        self._uri, self._place = uri, 0
        with _translated(uri):
            self._store, bucket, self._key = files.at(uri)
            self.details = file_info(bucket, obstore.head(self._store, self._key))

    def seek(self, place: int) -> None:
        """Read from this byte on."""
        self._place = place

    def read(self, size: int) -> bytes:
        """The next bytes. Raises FileNotFoundError where the object has another version by now."""
        wanted = self._place, self._place + size
        with _translated(self._uri):
            answer = obstore.get(self._store, self._key, options={"range": wanted, "if_match": self.details["ETag"]})
            data = bytes(answer.bytes())
        if _tag(answer.meta) != self.details["ETag"]:  # of a store that ignores the condition
            raise gone(self._uri)
        self._place += len(data)
        return data


def file_info(bucket: str, meta: "ObjectMeta") -> Info:
    """What obstore says of an object, in fsspec's words."""
    return {"name": f"{bucket}/{meta['path']}", "type": "file", "size": meta["size"], "ETag": _tag(meta)}


def gone(uri: str) -> FileNotFoundError:
    """The error for a version that is not there any more."""
    return FileNotFoundError(errno.ENOENT, "this version is gone", uri)


def _tag(meta: "ObjectMeta") -> str | None:
    """The ETag in quotes, also where a listing has it without."""
    tag = meta["e_tag"]
    return None if tag is None else '"{}"'.format(tag.strip('"'))


def _files(store: Store, bucket: str, listed: "Sequence[ObjectMeta]") -> Iterator[Info]:
    """The objects of a listing, each once.

    obstore leaves out the last slash of a folder's marker, which is empty. So the store is asked for the object of an
    empty one's name: there may be none, or one with content.
    """
    objects: dict[str, ObjectMeta] = {}
    for meta in listed:
        if meta["size"]:
            objects[meta["path"]] = meta
        elif meta["path"] not in objects:
            with suppress(FileNotFoundError):
                objects[meta["path"]] = obstore.head(store, meta["path"])
    return (file_info(bucket, meta) for meta in objects.values())


@contextmanager
def _translated(uri: str) -> Iterator[None]:
    """Translate obstore's errors. Raises FileNotFoundError, also for a version that is gone; and as `translated`."""
    try:
        yield
    except PreconditionError as error:
        raise gone(uri) from error
    except InvalidPathError as error:
        raise ValueError(f"{uri}: a key has an empty part or dots as one; rename it ({_said(error)})") from error
    except BaseError as error:
        said, status = _said(error), re.search(r"non-2xx status code: (\d+)", str(error))
        code = int(status[1]) if status else 0
        is_token = "performing token request" in said
        if code == 404 and not is_token:  # of a bucket
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), uri) from error
        if is_token and (code in REFUSED or (not code and METADATA.search(said))):
            raise _refused(uri, "no usable credentials", error) from error
        if code in REFUSED:
            raise _refused(uri, "access refused", error) from error
        raise StoreUnreachable(
            f"{uri}: the store did not answer as it should ({said}); check that it is up and reachable, and run again"
        ) from error


def _refused(uri: str, fault: str, error: BaseException) -> RawRefused:
    return RawRefused(
        f"{uri}: {fault} ({_said(error)}); check that the credentials ({CREDENTIALS[_scheme(uri)]}) are right and may "
        f"read and list there, and that the endpoint ({ENDPOINTS[_scheme(uri)][0]}), if you set one, is right"
    )


def _scheme(uri: str) -> str:
    return uri.partition(":")[0]


def _said(error: BaseException) -> str:
    """Without its parts, which follow, and without logins of URLs."""
    return without_logins(str(error).partition("\n")[0])
