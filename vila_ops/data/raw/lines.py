"""Files with one record a line, plain or gzipped: every line with its place, or those of a span."""

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from vila_ops.data.raw.files import Span


def every_line(path: Path) -> Iterator[tuple[int, bytes]]:
    """(bytes before it, line) of each line, blank ones too; bytes of the inflated text where the file is gzipped."""
    offset = 0
    with _open(path) as file:
        for line in file:
            yield offset, line
            offset += len(line)


def lines(span: Span) -> Iterator[tuple[str, bytes]]:
    """("FILE:NUMBER", line) of the lines of a span, blank ones too; NUMBER is the line's, from 1."""
    with _open(Path(span.path)) as file:
        file.seek(span.mark)
        for number, line in zip(range(span.start + 1, span.stop + 1), file, strict=False):
            yield f"{span.name}:{number}", line


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


class LineNumbers:
    """Numbers of the lines, from 1, on which bytes of a plain file stand: asked for in growing order, read once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset, self._number = 0, 1

    def at(self, offset: int) -> int:
        """The line of the byte after the first `offset` ones."""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            while block := file.read(max(0, min(1 << 20, offset - self._offset))):
                self._number += block.count(b"\n")
                self._offset += len(block)
        return self._number
