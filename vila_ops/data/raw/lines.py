"""Files with one record on each line, plain or gzipped: every line with its offset, or the lines of a span."""

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from vila_ops.data.raw.files import Span


def every_line(path: Path) -> Iterator[tuple[int, bytes]]:
    """(offset in bytes, line) of each line, blank ones too; a gzipped file has the offsets of its inflated text."""
    offset = 0
    with _open(path) as file:
        for line in file:
            yield offset, line
            offset += len(line)


def lines(span: Span) -> Iterator[tuple[str, bytes]]:
    """("FILE:NUMBER", line) of the lines of a span, blank ones too; NUMBER counts from 1."""
    with _open(Path(span.path)) as file:
        file.seek(span.mark)
        for number, line in zip(range(span.start + 1, span.stop + 1), file, strict=False):
            yield f"{span.name}:{number}", line


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


class LineNumbers:
    """Line numbers, from 1, of byte offsets in a plain file. Offsets must grow; the file is read once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset, self._number = 0, 1

    def at(self, offset: int) -> int:
        """The number of the line that contains the byte at `offset`."""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            while block := file.read(max(0, min(1 << 20, offset - self._offset))):
                self._number += block.count(b"\n")
                self._offset += len(block)
        return self._number
