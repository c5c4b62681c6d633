"""A table with an image and its caption in each row, and a folder of the images.

With `question` a row is an image, a question about it and the answer. Columns `licence` and `url` apply to the row;
further numeric columns are scores that filtering can read. With `image_url` the images come from the downloader.

If quotes swallow rows, because one is never closed or is closed rows later, each swallowed line is a bad record.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, closing
from functools import partial
from math import isfinite
from pathlib import Path

from vila_ops.config.sources import Separator, Table
from vila_ops.data.raw.downloaded import Downloaded, Missing, scan_downloaded
from vila_ops.data.raw.files import STRIDE, Folders, RawFile, Scan, Span, on_disk, paths, scan_files
from vila_ops.data.raw.lines import LineNumbers
from vila_ops.data.raw.objects import raw_path
from vila_ops.data.raw.tables import Layout, Row, fields_of, read_header, rows
from vila_ops.data.raw.url_files import out_of
from vila_ops.data.records import Dropped, Image, Record, Turn
from vila_ops.data.sources.faults import Fault, checked
from vila_ops.data.sources.images import object_of, path_inside, read_image

SEPARATORS: dict[str, Separator] = {".csv": "comma", ".tsv": "tab"}
"""Of a table whose source states none, by the end of its name."""
CHARACTERS: dict[Separator, str] = {"comma": ",", "tab": "\t", "semicolon": ";", "pipe": "|"}
URL_FILES = (".csv", ".tsv", ".txt", ".token")
"""The ends of the names of tables; the last two only if the source states its `separator`."""
CAPTION_NUMBER = re.compile(r"(?<=\.)([A-Za-z]{3,4})#[0-9]+$")
"""Behind the image's name in the tables of Flickr8k and Flickr30k: "1000092795.jpg#0"."""


def layout_of(source: Table, path: Path) -> Layout:
    """How the rows of a table are written. Raises ValueError if neither its name nor the source says so."""
    separator = source.separator or SEPARATORS.get(path.suffix.lower())
    if separator is None:
        raise ValueError(
            f"{path} ends neither in .csv nor in .tsv; say what separates its columns: `separator` of the source is "
            f"one of {', '.join(CHARACTERS)} (`-s separator=tab`)"
        )
    quotes = separator != "tab" if source.quotes is None else source.quotes
    return Layout(separator=CHARACTERS[separator], quotes=quotes, columns=source.columns)


def image_urls(source: Table, path: Path) -> Iterator[object]:
    """The column `image_url` of each row."""
    if source.image_url is None:
        raise ValueError("images of a table are downloaded if it has a column of URLs; name it: `-s image_url=COLUMN`")
    layout = layout_of(source, path)
    header, body = _header(source, path, layout)
    for row in rows(path, layout, body):
        try:
            yield _named(header, row.fields)[source.image_url] if row.fields else None
        except Fault:  # reported when the row is read
            continue


def raw_files(source: Table, folders: Folders, *, cache: Path) -> list[RawFile]:
    """The tables, with the images that their rows refer to. Raises ValueError if a column is missing."""
    root, suffixes = raw_path(source.path), URL_FILES if source.separator else tuple(SEPARATORS)
    settings = source.model_dump(include={"separator", "quotes", "columns", "image", "image_url", "text", "question"})
    kind = f"table:{source.images}:{settings}"
    if source.image_url is None:
        return scan_files(paths(root, suffixes), kind, lambda path: _scan(source, path, ()), cache=cache)
    return scan_downloaded(root, suffixes, kind, partial(_scan, source), images=source.images, cache=cache)


def read(source: Table, folders: Folders, span: Span) -> Iterator[list[Record | Dropped]]:
    """The record of each row, none for a blank row. A row's place is FILE:LINE, with the line on which it begins."""
    layout = layout_of(source, span.file())
    with ExitStack() as stack:
        lines = stack.enter_context(closing(LineNumbers(span.file())))
        images = stack.enter_context(_downloaded(source, span)) if source.image_url else None
        for number, header, row in _taken(source, span):
            if not row.fields or not span.takes(number):
                yield []
                continue
            place = f"{span.name}:{lines.at(row.offset)}"
            swallowed = _swallowed(source, layout, header, row)
            try:
                yield [_record(source, _whole(row, swallowed, header), images, place)]
            except Fault as fault:
                inside = [f"{span.name}:{lines.at(offset)}" for offset in swallowed]
                detail = f"the quotes that open in the row of {place} contain this line"
                yield [fault.dropped(place, where=place), *(Dropped(at, "bad_csv", at, detail) for at in inside)]


def _taken(source: Table, span: Span) -> Iterator[tuple[int, list[str], Row]]:
    """(number, names of the columns, row) of each row of a span."""
    path = span.file()
    layout = layout_of(source, path)
    header, body = _header(source, path, layout)
    for number, row in zip(range(span.start, span.stop), rows(path, layout, span.mark or body), strict=False):
        yield number, header, row


def _downloaded(source: Table, span: Span) -> Downloaded:
    urls: set[str] = set()
    for number, header, row in _taken(source, span):
        if row.fields and span.takes(number) and not isinstance(row.fields, Fault):
            urls.update(url for name, url in zip(header, row.fields, strict=False) if name == source.image_url)
    return Downloaded(out_of(source.images, span.name), {url.encode(errors="replace").decode() for url in urls})


def _swallowed(source: Table, layout: Layout, header: list[str], row: Row) -> list[int]:
    """Offsets of the lines inside the quotes of a row that are rows of their own; after broken quotes of all lines."""
    if isinstance(row.fields, Fault):
        return [offset for offset, line in row.inside if line.strip()]
    return [offset for offset, line in row.inside if _is_row(source, header, fields_of(line, layout))]


def _is_row(source: Table, header: list[str], fields: list[str]) -> bool:
    """Whether fields are a row: of the right number, with an image that is there, or a URL."""
    if len(fields) != len(header):
        return False
    row = dict(zip(header, fields, strict=True))
    if source.image_url is not None:
        return row[source.image_url].startswith(("http://", "https://"))
    try:
        return on_disk(path_inside(source.images, _image_name(source, row))).is_file()
    except Fault:
        return False


def _whole(row: Row, swallowed: list[int], header: list[str]) -> dict[str, str]:
    """The fields of a row by column. Raises Fault for a row that swallowed others or has another number of fields."""
    if swallowed and not isinstance(row.fields, Fault):
        text = f"its quotes contain {len(swallowed)} lines that are rows; close them, or double a quote of the text"
        raise Fault("bad_csv", text)
    return _named(header, row.fields)


def _named(header: list[str], fields: list[str] | Fault) -> dict[str, str]:
    if isinstance(fields, Fault):
        raise fields
    if len(fields) != len(header):
        raise Fault(
            "bad_row", f"{len(fields)} fields, but {len(header)} columns; quote a field that has the separator in it"
        )
    try:
        "".join(fields).encode("utf-8")
    except UnicodeEncodeError as error:
        raise Fault("invalid_utf8", "the row is not UTF-8; save the file in UTF-8") from error
    return dict(zip(header, fields, strict=True))


def _record(source: Table, row: dict[str, str], images: Downloaded | None, place: str) -> Record:
    text = _text(row, source.text)
    question = _text(row, source.question) if source.question else ""
    name = row[source.image_url].lower() if source.image_url else _image_name(source, row)
    image = _image(source, row, images)
    if source.question:
        turns: tuple[Turn, ...] = (Turn("user", (image, question)), Turn("assistant", (text,)))
    else:
        turns = (Turn("document", (image, text)),)
    url = row.get(source.image_url or "url")
    return Record(
        id=place,
        object=name if source.image_url else object_of(name, turns, id=place),
        turns=turns,
        category="",
        licence=row.get("licence") or row.get("license") or source.licence,
        provenance=f"{place} {url}" if url else place,
        scores=_scores({key: value for key, value in row.items() if key not in _used(source)}),
    )


def _image(source: Table, row: dict[str, str], images: Downloaded | None) -> Image:
    if images is None or source.image_url is None:
        return read_image(source.images, _image_name(source, row))
    url = checked(row[source.image_url], what=f"column {source.image_url!r}")
    if not url:
        raise Fault("no_url", f"column {source.image_url!r} is empty")
    data = images.image(url)
    if isinstance(data, Missing):
        raise data.fault(url)
    return Image(data)


def _image_name(source: Table, row: dict[str, str]) -> str:
    return CAPTION_NUMBER.sub(r"\1", row[source.image])


def _text(row: dict[str, str], column: str) -> str:
    text = checked(row[column], what=f"column {column!r}")
    if not text.strip():
        raise Fault("no_text", f"column {column!r} is empty; fill it, or remove the row")
    return text


def _used(source: Table) -> tuple[str | None, ...]:
    return (source.image_url or source.image, source.text, source.question)


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


def _header(source: Table, path: Path, layout: Layout) -> tuple[list[str], int]:
    """The names of the columns and the offset of the first row. Raises ValueError if a column is missing."""
    header, body = read_header(path, layout)
    for column in _used(source):
        if column is not None and column not in header:
            semicolons = "it looks separated by semicolons: set `separator: semicolon`"
            hint = semicolons if ";" in header[0] else "name the columns in the source"
            raise ValueError(f"{path} has no column {column!r}; it has {', '.join(map(repr, header))}; {hint}")
    return header, body


def _scan(source: Table, path: Path, downloaded: tuple[str, ...]) -> Scan:
    layout = layout_of(source, path)
    header, body = _header(source, path, layout)
    beside: dict[str, None] = dict.fromkeys(downloaded)
    marks: list[int] = []
    count = images = 0
    for count, row in enumerate(rows(path, layout, body), start=1):
        if (count - 1) % STRIDE == 0:
            marks.append(row.offset)
        if not row.fields:
            continue
        try:
            named = _named(header, row.fields)
            if source.image_url is None:
                beside[str(path_inside(source.images, _image_name(source, named)))] = None
        except Fault:  # reported when the row is read
            continue
        images += 1
    return Scan(count=count, images=images, marks=tuple(marks), beside=tuple(beside))
