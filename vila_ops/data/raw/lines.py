"""Files with one record on each line, plain, gzipped or zipped: every line with its offset, or the lines of a span."""

import gzip
import lzma
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from vila_ops.data.raw.files import Span
from vila_ops.data.raw.text import MAX_LINE, check_utf8
from vila_ops.errors import VilaError

GZIP, ZIP = b"\x1f\x8b", b"PK\x03\x04"
ENCRYPTED = 1
"""Bit of a zip member's flags (APPNOTE.TXT 4.4.4)."""
OFFICE = frozenset({"[Content_Types].xml", "mimetype"})
"""Members of the zip archives that documents of Office (OPC) and LibreOffice (ODF) are."""
_DAMAGE = (EOFError, NotImplementedError, lzma.LZMAError, struct.error, zipfile.BadZipFile, zlib.error, OSError)
"""What the standard library raises for damaged archives, and for methods that it does not know."""


def every_line(path: Path) -> Iterator[tuple[int, bytes]]:
    """(offset in bytes, line) of each line, blank ones too; a compressed file has the offsets of its inflated text.

    Raises ValueError for a damaged archive, and for text in UTF-16.
    """
    offset = 0
    with opened(path) as file:
        for line, length in _lines(file):
            if offset == 0:
                check_utf8(line, path)
            yield offset, line
            offset += length


def lines(span: Span) -> Iterator[tuple[str, bytes]]:
    """("FILE:NUMBER", line) of the lines of a span, blank ones too; NUMBER counts from 1."""
    with opened(span.file()) as file:
        file.seek(span.mark)
        for number, (line, _) in zip(range(span.start + 1, span.stop + 1), _lines(file), strict=False):
            yield f"{span.name}:{number}", line


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A file opened to be read, inflated if its first bytes are those of gzip or of a zip archive of one file.

    Raises ValueError for a zip archive of several files, and if the archive turns out to be damaged.
    """
    with path.open("rb") as file:
        start = file.read(4)
        file.seek(0)
        if not start.startswith((GZIP, ZIP)):
            yield file
            return
        try:
            if start == ZIP:
                with zipfile.ZipFile(file) as archive, archive.open(_only_member(path, archive)) as member:
                    yield cast(BinaryIO, member)
            else:
                with gzip.open(file) as inflated:
                    yield cast(BinaryIO, inflated)
        except VilaError:  # of the store, not of the archive
            raise
        except _DAMAGE as error:
            raise ValueError(f"{path} is a damaged archive ({error}); fetch it again, or unpack it") from error


def _only_member(path: Path, archive: zipfile.ZipFile) -> str:
    members = [one for one in archive.infolist() if not one.is_dir() and not one.filename.startswith("__MACOSX/")]
    if OFFICE.intersection(one.filename for one in members):
        raise ValueError(f"{path} is a spreadsheet or another document; save it as CSV in UTF-8")
    if len(members) != 1:
        raise ValueError(f"{path} holds {len(members)} files, and a zipped file of records holds one; unpack it")
    if members[0].flag_bits & ENCRYPTED:
        raise ValueError(f"{path} is encrypted; unpack it")
    return members[0].filename


def _lines(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Each line, cut to MAX_LINE bytes, and its whole length."""
    while line := file.readline(MAX_LINE):
        length = len(line)
        end = line
        while len(end) == MAX_LINE and not end.endswith(b"\n"):
            end = file.readline(MAX_LINE)
            length += len(end)
        yield line, length


class LineNumbers:
    """Line numbers, from 1, of byte offsets in a plain file. Offsets must grow; the file is read once."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._offset, self._number = 0, 1

    def at(self, offset: int) -> int:
        """The number of the line that contains the byte at `offset`."""
        while block := self._file.read(max(0, min(1 << 20, offset - self._offset))):
            self._number += block.count(b"\n")
            self._offset += len(block)
        return self._number

    def close(self) -> None:
        """Close the file."""
        self._file.close()
