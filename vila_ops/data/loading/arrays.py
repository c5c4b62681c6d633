"""Folders of cached arrays: written atomically, memory-mapped, verified when they are read.

NAME.npy          an array in numpy's format
NAME.checks.npy   the CRC-32 of every PIECE of it
header.json       facts about the arrays, the sizes of all files, the CRC-32 of the checks, and its own checksum
"""

import errno
import json
import os
import secrets
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vila_ops.artifacts.disk import sync
from vila_ops.config.base import fingerprint

HEADER = "header.json"
CHECKS = ".checks.npy"
PIECE = 2**14
"""Bytes that are verified together, when one of them is read for the first time."""


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
        header = _header(folder) or _write(folder, make)
        self.facts: dict[str, Any] = header["facts"]
        self._arrays = {name: _map(folder / f"{name}.npy") for name in header["checks"]}
        self._checks = {name: _load_checks(folder, name) for name in header["checks"]}
        self._verified = {name: bytearray(len(checks)) for name, checks in self._checks.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Elements [start, stop) of an array. Raises DamagedCache."""
        array = self._arrays[name]
        stop = len(array) if stop is None else stop
        first, last = start * array.itemsize // PIECE, -(-stop * array.itemsize // PIECE)
        if self._verified[name].count(0, first, last):
            whole = array.data.cast("B")
            for piece in range(first, last):
                if zlib.crc32(whole[piece * PIECE : (piece + 1) * PIECE]) != self._checks[name][piece]:
                    raise DamagedCache(self.folder, f"{name} differs from its CRC-32 in piece {piece}")
                self._verified[name][piece] = 1
        return array[start:stop]


def _header(folder: Path) -> dict[str, Any] | None:
    """The header of a folder; None if the folder is missing or incomplete."""
    try:
        header: dict[str, Any] = json.loads((folder / HEADER).read_text())
        if header.pop("checksum") != fingerprint(header) or header["sizes"] != _sizes(folder, header["sizes"]):
            return None
        whole = all(zlib.crc32(_load_checks(folder, name).data) == check for name, check in header["checks"].items())
        return header if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write(folder: Path, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    draft = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    draft.mkdir(parents=True)
    try:
        facts = make(draft)
        checks = {path.stem: _checks(path) for path in sorted(draft.glob("*.npy"))}
        for name, values in checks.items():
            np.save(draft / f"{name}{CHECKS}", values)
        sizes = _sizes(draft, [path.name for path in sorted(draft.iterdir())])
        header = {
            "facts": facts,
            "sizes": sizes,
            "checks": {name: zlib.crc32(values.data) for name, values in checks.items()},
        }
        (draft / HEADER).write_text(json.dumps({**header, "checksum": fingerprint(header)}))
        for path in (*draft.iterdir(), draft):
            sync(path)
        try:
            os.rename(draft, folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if (first := _header(folder)) is not None:
                return first
            discard(folder)
            os.rename(draft, folder)
        return header
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def discard(folder: Path) -> None:
    """Remove a folder; existing memory maps of its files stay valid."""
    shutil.rmtree(folder, ignore_errors=True)


def _checks(path: Path) -> NDArray[np.uint32]:
    whole = _map(path).data.cast("B")
    return np.array([zlib.crc32(whole[start : start + PIECE]) for start in range(0, len(whole), PIECE)], np.uint32)


def _load_checks(folder: Path, name: str) -> NDArray[np.uint32]:
    checks: NDArray[np.uint32] = np.load(folder / f"{name}{CHECKS}", allow_pickle=False)
    return checks


def _map(path: Path) -> NDArray[Any]:
    array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def _sizes(folder: Path, names: Any) -> dict[str, int]:
    return {name: (folder / name).stat().st_size for name in names}
