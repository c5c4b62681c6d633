"""Folders of cached arrays: written atomically, memory-mapped, verified when they are read.

NAME.npy   an array in numpy's format
NAME.crc   the CRC-32 of every PIECE of that file, its header included, as little-endian uint32
header     a sha256, and on the next line JSON: facts about the arrays, sizes of the files, CRC-32 of each NAME.crc

No byte of a folder is parsed before it was verified, so that any damage leads to the folder being written again.
"""

import errno
import hashlib
import json
import logging
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import DTypeLike, NDArray

from vila_ops.artifacts.disk import remove, sync
from vila_ops.artifacts.disk_faults import faults_named

HEADER = "header"
CHECKS = ".crc"
CRC = np.dtype("<u4")
PIECE = 2**14
"""Bytes that are verified together, when one of them is read for the first time."""
OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
"""Error numbers of a rename onto a name that is taken."""
log = logging.getLogger(__name__)


class DamagedCache(ValueError):
    """A cached array differs from what was written."""

    def __init__(self, folder: Path, what: str) -> None:
        super().__init__(f"the cache {folder} is damaged: {what}")
        self.folder = folder


class Arrays:
    """The one-dimensional arrays of one folder, memory-mapped."""

    def __init__(self, folder: Path, make: Callable[[Path], dict[str, Any]]) -> None:
        """`make` fills an empty folder with NAME.npy and returns `facts`; it is called if the folder is not complete.

        Processes may race: each computes the same arrays, and the first folder stays.
        """
        self.folder = folder
        if (header := _header(folder)) is None:
            if folder.exists():
                log.warning("the cache %s is not whole; it is rebuilt", folder)
            header = _write(folder, make)
        self.facts: dict[str, Any] = header["facts"]
        paths = {name: folder / f"{name}.npy" for name in header["checks"]}
        self._arrays: dict[str, Any] = {name: np.load(path, mmap_mode="r") for name, path in paths.items()}
        self._bytes = {name: _bytes_of(path) for name, path in paths.items()}
        self._checks = {name: np.fromfile(folder / f"{name}{CHECKS}", CRC) for name in paths}
        self._verified = {name: bytearray(len(checks)) for name, checks in self._checks.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Elements [start, stop) of an array. Raises DamagedCache."""
        array = self._arrays[name]
        stop = len(array) if stop is None else stop
        first = (array.offset + start * array.itemsize) // PIECE
        last = -(-(array.offset + stop * array.itemsize) // PIECE)
        if self._verified[name].count(0, first, last):
            self._verify(name, range(first, last))
        values: NDArray[Any] = array[start:stop]
        return values

    def take(self, name: str, numbers: NDArray[np.integer]) -> NDArray[Any]:
        """The elements with these numbers, in their order. Raises DamagedCache."""
        array = self._arrays[name]
        self._verify(name, np.unique((array.offset + numbers.astype(np.int64) * array.itemsize) // PIECE).tolist())
        values: NDArray[Any] = array[numbers]
        return values

    def _verify(self, name: str, pieces: Iterable[int]) -> None:
        for piece in pieces:
            if self._verified[name][piece]:
                continue
            if _crc_of(self._bytes[name], piece) != self._checks[name][piece]:
                raise DamagedCache(self.folder, f"{name} differs from its CRC-32 in piece {piece}")
            self._verified[name][piece] = 1


def new_array(path: Path, dtype: DTypeLike, size: int) -> NDArray[Any]:
    """A new memory-mapped array whose space is reserved: a full disk is an OSError here, and not a signal later on."""
    array: NDArray[Any] = open_memmap(path, "w+", dtype, (size,))
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _header(folder: Path) -> dict[str, Any] | None:
    """The header of a folder; None if the folder is missing, incomplete, or damaged where an array is opened."""
    try:
        checksum, _, text = (folder / HEADER).read_bytes().partition(b"\n")
        if checksum.decode("ascii", "replace") != hashlib.sha256(text).hexdigest():
            return None
        header: dict[str, Any] = json.loads(text)
        if header["sizes"] != _sizes(folder, header["sizes"]):
            return None
        for name, check in header["checks"].items():
            checks = np.fromfile(folder / f"{name}{CHECKS}", CRC)
            if zlib.crc32(checks.data) != check or _crc_of(_bytes_of(folder / f"{name}.npy"), 0) != checks[0]:
                return None
    except OSError:
        return None
    return header


def _write(folder: Path, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    draft = folder.with_name(f".{folder.name}-{secrets.token_hex(6)}")
    try:
        with faults_named(draft):
            draft.mkdir(parents=True)
            header = _fill(draft, make)
        return _publish(draft, folder, header)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _fill(draft: Path, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Write all files of a folder durably; returns its header."""
    facts = make(draft)
    checks = {path.stem: _checks(path) for path in sorted(draft.glob("*.npy"))}
    for name, values in checks.items():
        (draft / f"{name}{CHECKS}").write_bytes(values.data)
    header = {
        "facts": facts,
        "sizes": _sizes(draft, [path.name for path in sorted(draft.iterdir())]),
        "checks": {name: zlib.crc32(values.data) for name, values in checks.items()},
    }
    text = json.dumps(header).encode()
    (draft / HEADER).write_bytes(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
    for path in (*draft.iterdir(), draft):
        sync(path)
    return header


def _publish(draft: Path, folder: Path, header: dict[str, Any]) -> dict[str, Any]:
    """Give a draft its name; returns its header, or that of the whole folder that another process put there first."""
    while True:
        try:
            os.rename(draft, folder)
        except OSError as error:
            if error.errno not in OCCUPIED:
                raise
        else:
            return header
        if (first := _header(folder)) is not None:
            return first
        remove(str(folder))


def _checks(path: Path) -> NDArray[np.uint32]:
    """The CRC-32 of every piece of a file."""
    whole = _bytes_of(path)
    return np.array([_crc_of(whole, piece) for piece in range(-(-len(whole) // PIECE))], CRC)


def _crc_of(whole: memoryview, piece: int) -> int:
    return zlib.crc32(whole[piece * PIECE : (piece + 1) * PIECE])


def _bytes_of(path: Path) -> memoryview:
    """The bytes of a file that is not empty, memory-mapped."""
    return np.memmap(path, np.uint8, "r").data


def _sizes(folder: Path, names: Any) -> dict[str, int]:
    return {name: (folder / name).stat().st_size for name in names}
