"""Rows of text tables with their offsets: CSV with quotes (RFC 4180), TSV without (IANA's tab-separated-values)."""

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from vila_ops.data.raw.text import HEAD, check_utf8
from vila_ops.data.sources.faults import Fault

MAX_FIELD = 1 << 24
"""Characters; a longer field has probably lost its closing quote."""


@dataclass(frozen=True)
class Layout:
    """How the rows of a table are written."""

    separator: str
    """One character."""
    quotes: bool
    """Whether a field may stand in double quotes, and contain separators and line ends there."""
    columns: tuple[str, ...] | None
    """The names of the columns; None if the first row has them."""


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    offset: int
    """Of its first line, in bytes."""
    fields: list[str] | Fault
    """Empty for a blank row; a Fault (bad_csv) for broken quotes."""
    inside: tuple[tuple[int, str], ...]
    """Offset and text of each further line that its quotes span."""


def read_header(path: Path, layout: Layout) -> tuple[list[str], int]:
    """The names of the columns, and the offset of the first row. Raises ValueError if there are none."""
    if layout.columns is not None:
        return list(layout.columns), 0
    row = next(rows(path, layout, 0), None)
    fields = [] if row is None else row.fields
    if isinstance(fields, Fault):
        raise ValueError(f"{path}:1: the header cannot be read ({fields}); it names the columns, each once")
    header = [name.strip() for name in fields]
    if header and header[0].lower().startswith("sep="):
        note = layout.separator.join(header)
        raise ValueError(f"{path}:1: {note!r} is a note for Excel; remove this line, and set `separator` of the source")
    if row is None or not header or len(set(header)) < len(header):
        raise ValueError(f"{path}:1: a table begins with the names of its columns, each once, not with {header!r}")
    with path.open("rb") as file:
        return header, sum(len(file.readline()) for _ in range(1 + len(row.inside)))


def rows(path: Path, layout: Layout, start: int) -> Iterator[Row]:
    """The rows from the one at byte `start` on."""
    with path.open("rb") as file:
        check_utf8(file.read(HEAD), path)
        file.seek(start)
        lines = _Lines(file)
        reader = _reader(lines, layout)
        while True:
            lines.taken.clear()
            fields: list[str] | Fault
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                fields = Fault("bad_csv", f"{error}{_hint(error)}")
            (offset, _), *inside = lines.taken
            yield Row(offset=offset, fields=fields, inside=tuple(inside))


def fields_of(line: str, layout: Layout) -> list[str]:
    """The fields of a line on its own; none if it cannot be read."""
    try:
        return next(_reader([line], layout), [])
    except csv.Error:
        return []


def _reader(lines: Iterable[str], layout: Layout) -> Iterator[list[str]]:
    csv.field_size_limit(MAX_FIELD)
    return csv.reader(
        lines,
        delimiter=layout.separator,
        quoting=csv.QUOTE_MINIMAL if layout.quotes else csv.QUOTE_NONE,
        skipinitialspace=layout.separator == "|",  # as in Flickr30k's table, "a.jpg| 0| Two men"
        strict=True,
    )


def _hint(error: csv.Error) -> str:
    if "new-line character" in str(error):
        return "; its lines end with CR alone, as on old Macs: tr '\\r' '\\n' < FILE > NEW_FILE"
    if "end of data" in str(error) or "field larger" in str(error):
        return "; a quote is never closed: close it, or double a quote that belongs to the text"
    return ""


class _Lines:
    """Lines of text; bytes that are not UTF-8 are decoded to lone surrogates."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._offset = file.tell()
        self.taken: list[tuple[int, str]] = []
        """Offset and text of each line since the list was cleared."""

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._file.readline(MAX_FIELD)
        if not line:
            raise StopIteration
        text = line.decode("utf-8", "surrogateescape")
        text = text.removeprefix("\ufeff") if self._offset == 0 else text
        self.taken.append((self._offset, text))
        self._offset += len(line)
        return text
