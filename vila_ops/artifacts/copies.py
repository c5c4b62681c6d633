"""Where copies of what lies on S3 are on this machine: `s3://bucket/prefix/...` is $VILA_CACHE/s3/bucket/prefix/...

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
"""For a copy that another process makes; two that make it at once only do the work twice."""


def copy_of(uri: str) -> Path:
    """Where the copy of a place on S3 lies."""
    return _cache() / "s3" / uri.removeprefix(SCHEME)


def uri_of(path: Path) -> str | None:
    """The place whose copy a path is; None for a path that is no copy."""
    copies = _cache() / "s3"
    return f"{SCHEME}{path.relative_to(copies).as_posix()}" if path.is_relative_to(copies) else None


def draft() -> Path:
    """A fresh name on the same file system as the copies, but not among them."""
    folder = _cache() / "drafts"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / secrets.token_hex(8)


@contextmanager
def one_at_a_time(uri: str) -> Iterator[None]:
    """One thread of one process of this machine at a time, so that a file is downloaded once.

    A lock goes with the process that held it, and one that is stopped is not waited for longer than PATIENCE_SECONDS.
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
