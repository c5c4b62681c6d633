"""Disks that are full, over a limit, broken or read-only: errors that name the path, its bytes and the free ones."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISDIR

from vila_ops.errors import DiskFault, VilaError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a disk that is full, or of a limit of the user."""
FAULTS = (*FULL, errno.EIO, errno.EROFS)
WAY_OUT = "free space on it, repair it or choose another disk, and run again"
_OF_RUST = re.compile(r"\(os error (\d+)\)|Os \{ code: (\d+)")
"""How libraries in Rust (safetensors, tokenizers) report an error number."""
_OF_NUMPY = re.compile(r"\d+ requested and \d+ written")
"""How numpy reports a write that was cut short."""


@contextmanager
def faults_named(path: Path) -> Iterator[None]:
    """Translate the error of a disk that fails while `path`, a file or a folder, is written. Raises DiskFault.

    The errors of write(2) and of libraries name neither path nor bytes.
    """
    try:
        yield
    except Exception as error:
        if (number := _number_of(error, path)) is None:
            raise
        raise DiskFault(
            number,
            f"{path} was not completed ({os.strerror(number)}): {size_of(path)} bytes of it are there, and its disk "
            f"has {free_bytes(path)} bytes free; {WAY_OUT}",
        ) from error


def require(path: Path, num_bytes: int) -> None:
    """Raise DiskFault before `path` is written where its disk has less than `num_bytes` free."""
    if (free := free_bytes(path)) < num_bytes:
        raise DiskFault(
            errno.ENOSPC,
            f"{path} needs {num_bytes} bytes, and its disk has {free} bytes free; {WAY_OUT}",
        )


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; files that are removed meanwhile do not count."""
    total = 0
    for one in (path, *path.rglob("*")):
        with suppress(FileNotFoundError, NotADirectoryError):
            stat = one.lstat()
            total += 0 if S_ISDIR(stat.st_mode) else stat.st_size
    return total


def free_bytes(path: Path) -> int:
    """Free bytes of the disk of a path, or of the nearest folder above it that exists; 0 if they cannot be read."""
    try:
        return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.exists())).free
    except OSError:
        return 0


def _number_of(error: Exception, path: Path) -> int | None:
    """The error number of the disk of `path`; None for any other error, and for one that is ours already."""
    if isinstance(error, VilaError):
        return None
    number = None
    if isinstance(error, OSError):
        named = [Path(name) for name in (error.filename, error.filename2) if isinstance(name, str)]
        if named and not any(name.is_relative_to(path.parent) for name in named):
            return None  # a file elsewhere, which it names
        number = errno.ENOSPC if _OF_NUMPY.fullmatch(str(error)) else error.errno
    if of_rust := _OF_RUST.search(str(error)):
        number = int(of_rust[1] or of_rust[2])
    return number if number in FAULTS else None
