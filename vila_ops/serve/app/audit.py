"""The audit log: lines of JSON that are only appended, each with the hash of the line before. Light.

It says who asked for what, when, and what came of it; never what a prompt or an answer said. A line that is changed,
removed or put in breaks the chain. Lines cut off at the end do not: compare the last hash with one kept elsewhere.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vila_ops.errors import CorruptArtifact

FIRST = "0" * 64
"""What stands for the line before the first."""
MAX_LINE_BYTES = 16_384


class AuditLog:
    """Appends to one file, to which several processes of a host may append."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)

    def write(self, event: Mapping[str, Any]) -> None:
        """Append an event with its time. Raises OSError."""
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            line = {"time": datetime.now(UTC).isoformat(), **event, "previous": self._last_hash()}
            os.write(self._file, json.dumps(line).encode() + b"\n")
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _last_hash(self) -> str:
        size = os.fstat(self._file).st_size
        tail = os.pread(self._file, MAX_LINE_BYTES, max(0, size - MAX_LINE_BYTES))
        return hash_of(tail.removesuffix(b"\n").rpartition(b"\n")[2]) if tail else FIRST


def hash_of(line: bytes) -> str:
    """The hash of a line without its end, which the next line holds."""
    return hashlib.sha256(line).hexdigest()


def check_log(path: Path) -> tuple[int, str]:
    """The number of lines, and the hash of the last one. Raises CorruptArtifact that names the first wrong line."""
    previous, number = FIRST, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = line.removesuffix(b"\n")
            try:
                stated = json.loads(text)["previous"]
            except (ValueError, TypeError, LookupError):
                stated = None
            if stated != previous or text == line:
                raise CorruptArtifact(f"{path}: line {number} does not follow from the lines before it")
            previous = hash_of(text)
    return number, previous
