"""A CSV (commas) or TSV (tabs) with a header, and a folder of images: a row is an image and its caption.

With `question` a row is an image, a question about it and the answer. Columns `licence` and `url` apply to the row;
further numeric columns are scores that filtering can read.
"""

import csv
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import IO

from vila_ops.config.sources import Table
from vila_ops.data.raw.files import STRIDE, Folders, RawFile, Scan, Span, paths, scan_files
from vila_ops.data.raw.lines import LineNumbers
from vila_ops.data.records import Dropped, Record, Turn
from vila_ops.data.sources.faults import Fault, checked
from vila_ops.data.sources.images import object_of, path_inside, read_image

DELIMITERS = {".csv": ",", ".tsv": "\t"}
MAX_FIELD = 1 << 26
"""Characters; a longer field has probably lost its closing quote."""


def raw_files(source: Table, folders: Folders, *, cache: Path) -> list[RawFile]:
    """The tables, with the images that their rows refer to. Raises ValueError if a column is missing."""
    return scan_files(
        paths(Path(source.path), tuple(DELIMITERS)),
        f"table:{source.images}:{source.image}:{source.text}:{source.question}",
        lambda path: _scan(source, path),
        cache=cache,
    )


def read(source: Table, folders: Folders, span: Span) -> Iterator[list[Record | Dropped]]:
    """The record of each row, none for a blank row. A row's place is FILE:LINE, with the line on which it begins."""
    path = Path(span.path)
    header, body = read_header(path)
    lines = LineNumbers(path)
    for number, (offset, fields) in zip(range(span.start, span.stop), _rows(path, span.mark or body), strict=False):
        if not fields or not span.takes(number):
            yield []
            continue
        place = f"{span.name}:{lines.at(offset)}"
        try:
            yield [_record(source, _named(header, fields), place)]
        except Fault as error:
            yield [error.dropped(place, where=place)]


def read_header(path: Path) -> tuple[list[str], int]:
    """The names of the columns, and the length of the header in bytes. Raises ValueError if there are none."""
    with path.open("rb") as file:
        lines = _Lines(file)
        try:
            header: list[str] = next(_reader(path, lines), [])
        except csv.Error as error:
            raise ValueError(
                f"{path}:1: the header cannot be read ({error}); it names the columns, each once"
            ) from error
    if not header or len(set(header)) < len(header):
        raise ValueError(f"{path}:1: a table begins with the names of its columns, each once, not with {header!r}")
    return header, lines.offset


class _Lines:
    """Lines of text with the offset after them; bytes that are not UTF-8 are decoded to lone surrogates."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.offset = file.tell()

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._file.readline()
        if not line:
            raise StopIteration
        text = line.decode("utf-8", "surrogateescape")
        text = text.removeprefix("\ufeff") if self.offset == 0 else text
        self.offset += len(line)
        return text


def _reader(path: Path, lines: _Lines) -> Iterator[list[str]]:
    csv.field_size_limit(MAX_FIELD)
    return csv.reader(lines, delimiter=DELIMITERS[path.suffix.lower()], strict=True)


def _rows(path: Path, start: int) -> Iterator[tuple[int, list[str] | Fault]]:
    """(offset in bytes, fields) of each row from byte `start` on: [] for a blank row, a Fault for broken quotes."""
    with path.open("rb") as file:
        file.seek(start)
        lines = _Lines(file)
        reader = _reader(path, lines)
        while True:
            offset = lines.offset
            try:
                yield offset, next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                hint = (
                    "; a quote is never closed, so the rest of the file is inside it"
                    if "end of data" in str(error)
                    else ""
                )
                yield offset, Fault("bad_csv", f"{error}{hint}")


def _named(header: list[str], fields: list[str] | Fault) -> dict[str, str]:
    if isinstance(fields, Fault):
        raise fields
    if len(fields) != len(header):
        raise Fault(
            "bad_row", f"{len(fields)} fields, but {len(header)} columns; quote a field that has the delimiter in it"
        )
    try:
        "".join(fields).encode("utf-8")
    except UnicodeEncodeError as error:
        raise Fault("invalid_utf8", "the row is not UTF-8; save the file in UTF-8") from error
    return dict(zip(header, fields, strict=True))


def _record(source: Table, row: dict[str, str], place: str) -> Record:
    name, text = row[source.image], _text(row, source.text)
    question = _text(row, source.question) if source.question else ""
    image = read_image(source.images, name)
    if source.question:
        turns: tuple[Turn, ...] = (Turn("user", (image, question)), Turn("assistant", (text,)))
    else:
        turns = (Turn("document", (image, text)),)
    url = row.get("url")
    return Record(
        id=place,
        object=object_of(name, turns, id=place),
        turns=turns,
        category="",
        licence=row.get("licence") or row.get("license") or source.licence,
        provenance=f"{place} {url}" if url else place,
        scores=_scores({key: value for key, value in row.items() if key not in _used(source)}),
    )


def _text(row: dict[str, str], column: str) -> str:
    text = checked(row[column], what=f"column {column!r}")
    if not text.strip():
        raise Fault("no_text", f"column {column!r} is empty; fill it, or remove the row")
    return text


def _used(source: Table) -> tuple[str | None, ...]:
    return (source.image, source.text, source.question)


def _scores(row: dict[str, str]) -> dict[str, float]:
    scores = {}
    for column, value in row.items():
        try:
            number = float(value)
        except ValueError:
            continue
        if isfinite(number):
            scores[column] = number
    return scores


def _scan(source: Table, path: Path) -> Scan:
    header, body = read_header(path)
    for column in _used(source):
        if column is not None and column not in header:
            semicolons = "it looks separated by semicolons: save it with commas"
            hint = semicolons if ";" in header[0] else "name the columns in the source"
            raise ValueError(f"{path} has no column {column!r}; it has {', '.join(map(repr, header))}; {hint}")
    beside: dict[str, None] = {}
    marks: list[int] = []
    count = images = 0
    for count, (offset, fields) in enumerate(_rows(path, body), start=1):
        if (count - 1) % STRIDE == 0:
            marks.append(offset)
        if not fields:
            continue
        try:
            beside[str(path_inside(source.images, _named(header, fields)[source.image]))] = None
        except Fault:  # reported when the row is read
            continue
        images += 1
    return Scan(count=count, images=images, marks=tuple(marks), beside=tuple(beside))
