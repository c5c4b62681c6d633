"""Local copies of objects on S3: the copy of `s3://bucket/prefix/...` is $VILA_CACHE/s3/bucket/prefix/...

$VILA_CACHE is ~/.cache/vila-ops unless it is set. Light: no boto3.
"""

import fcntl
import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SCHEME = "s3://"
PATIENCE_SECONDS = 600.0
"""How long to wait for another process that makes the same copy. Two that make it at once only waste work."""


def copy_of(uri: str) -> Path:
    """Path of the local copy of a place on S3."""
    return _cache() / "s3" / uri.removeprefix(SCHEME)


def uri_of(path: Path) -> str | None:
    """The place on S3 of which a path is the copy; None for any other path."""
    copies = _cache() / "s3"
    return f"{SCHEME}{path.relative_to(copies).as_posix()}" if path.is_relative_to(copies) else None


def drafts() -> Path:
    """The folder of unfinished copies, on the file system of the copies."""
    return _cache() / "drafts"


def draft() -> Path:
    """An unused path in the folder of unfinished copies."""
    drafts().mkdir(parents=True, exist_ok=True)
    return drafts() / secrets.token_hex(8)


@contextmanager
def one_at_a_time(uri: str) -> Iterator[None]:
    """Admit one thread of this machine at a time, so that a file is downloaded once.

    The kernel frees the lock of a process that ends. A stopped process is waited for PATIENCE_SECONDS at most.
    """
    lock = _cache() / "locks" / hashlib.sha256(uri.encode()).hexdigest()[:32]
    lock.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + PATIENCE_SECONDS
    with lock.open("w") as file:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
        yield


def _cache() -> Path:
    return Path(os.environ.get("VILA_CACHE", "~/.cache/vila-ops")).expanduser().resolve()
