"""Parquet shards of a Hugging Face dataset: images in the rows, with captions or conversations.

The image column is an Image feature, which is stored as struct<bytes, path>, or plain binary, or a list of either. The
text column is a string, or a list of turns: chat messages {role, content}, LLaVA's {from, value}, or The Cauldron's
{user, assistant}; or it is a struct of such lists, as `datasets` stores a Sequence of mappings, or the list as JSON
text. A column `system` is their system prompt. Numeric columns become scores, which filtering can read.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, assert_never

import pyarrow as pa

from vila_ops.config.sources import HfParquet
from vila_ops.data.raw.files import Folders, RawFile, Scan, Span, paths, scan_files
from vila_ops.data.raw.objects import raw_path
from vila_ops.data.raw.text import DECODER
from vila_ops.data.records import Dropped, Image, Record, Turn
from vila_ops.data.sources.conversations import BESIDE, prompt_beside
from vila_ops.data.sources.faults import Fault, checked, finite_numbers
from vila_ops.data.sources.media import refuse_unread
from vila_ops.data.sources.rows import is_binary, is_list, is_text, media_columns, number_columns, open_parquet, rows
from vila_ops.data.sources.turns import with_images


def raw_files(source: HfParquet, folders: Folders, *, cache: Path) -> list[RawFile]:
    """The shards. Raises ValueError for a shard without the source's columns, or with columns of other types."""
    kind = f"{source.kind}:{source.image}:{source.text}:{source.render}"
    return scan_files(paths(raw_path(source.path), (".parquet",)), kind, lambda path: _scan(source, path), cache=cache)


def read(source: HfParquet, folders: Folders, span: Span) -> Iterator[list[Record | Dropped]]:
    """The record of each row."""
    with open_parquet(span.file()) as file:
        schema = file.schema_arrow
    own = (source.image, source.text)
    columns = [*own, *number_columns(schema), *media_columns(schema, but=(*own, *source.ignore))]
    if source.render == "conversation":
        columns += [name for name in BESIDE if name in schema.names and name not in columns]
    for number, (where, row) in enumerate(rows(span, columns), start=span.start):
        if not span.takes(number):
            yield []
            continue
        try:
            yield [_record(source, row, where=where)]
        except Fault as fault:
            yield [fault.dropped(where, where=where)]


def _record(source: HfParquet, row: dict[str, Any] | Fault, *, where: str) -> Record:
    if isinstance(row, Fault):
        raise row
    cell = row.pop(source.image)
    cells = cell if isinstance(cell, list) else [] if cell is None else [cell]
    images = [_image(one) for one in cells]
    system = prompt_beside(row, (source.text, *source.ignore)) if source.render == "conversation" else None
    text = row.pop(source.text)
    refuse_unread(row, read=(), ignore=source.ignore, shown=[_path(one) for one in cells])
    messages: tuple[Turn, ...]
    notes: tuple[str, ...] = ()
    match source.render:
        case "caption":
            if not images:
                raise Fault("no_image", f"the column {source.image!r} is empty")
            if not text or not text.strip():
                raise Fault("no_text", f"the column {source.text!r} is empty")
            messages = (Turn("document", (*images, checked(text.strip(), what="the caption"))),)
        case "conversation":
            messages, notes = with_images(_listed(text), images, system=system)
        case _:
            assert_never(source.render)
    return Record(
        id=where,
        object=(_image_name(cells[0]) if cells else where).lower(),
        turns=messages,
        category="",
        licence=source.licence,
        provenance=where,
        scores=finite_numbers(row),
        notes=notes,
    )


def _listed(turns: Any) -> Any:
    """A list of turns, as `datasets` stores it: a Sequence of mappings is a mapping of lists; or as JSON text.

    Raises Fault.
    """
    if isinstance(turns, str):
        try:
            return DECODER.decode(turns)
        except (ValueError, RecursionError) as error:
            raise Fault("bad_json", f"the turns are no JSON: {error}") from error
    if not isinstance(turns, dict):
        return turns
    columns = {key: value or [] for key, value in turns.items()}
    if len(set(map(len, columns.values()))) > 1:
        lengths = ", ".join(f"{key} {len(value)}" for key, value in columns.items())
        raise Fault("malformed_turns", f"the lists of the turns differ in length: {lengths}; each has one value a turn")
    return [dict(zip(columns, turn, strict=True)) for turn in zip(*columns.values(), strict=True)]


def _image(cell: dict[str, Any] | bytes | None) -> Image:
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if data:
        return Image(data)
    path = cell.get("path") if isinstance(cell, dict) else None
    if path:
        way = "write the dataset with its images embedded (datasets: embed_external_files=True)"
        raise Fault("external_image", f"{path[:200]!r} is outside of the file; {way}")
    raise Fault("no_image", "an image without bytes and without a path")


def _path(cell: dict[str, Any] | bytes | None) -> str:
    return (cell.get("path") or "") if isinstance(cell, dict) else ""


def _image_name(cell: dict[str, Any] | bytes) -> str:
    """The path of an image, or else a digest of its content."""
    if isinstance(cell, dict):
        return checked(cell["path"], what="the path") if cell.get("path") else _image_name(cell["bytes"])
    return hashlib.sha256(cell).hexdigest()[:24]


def _scan(source: HfParquet, path: Path) -> Scan:
    with open_parquet(path) as file:
        schema, count = file.schema_arrow, file.metadata.num_rows
    for column, is_fit, wanted in (
        (source.image, _holds_images, "images (struct<bytes, path>, binary, or a list of them)"),
        (source.text, *_TEXTS[source.render]),
    ):
        if column not in schema.names:
            raise ValueError(
                f"{path} has no column {column!r} but {', '.join(schema.names)}; name the columns of images and texts "
                f"(`-s image=COLUMN -s text=COLUMN`, and `-s render=conversation` for turns)"
            )
        if not is_fit(kind := schema.field(column).type):
            raise ValueError(f"{path}: column {column!r} is {kind}, not {wanted}; name another column, or set render")
    return Scan(count=count, images=count)


def _holds_images(kind: pa.DataType) -> bool:
    one = kind.value_type if is_list(kind) else kind
    if pa.types.is_struct(one):
        return one.get_field_index("bytes") >= 0 and is_binary(one.field("bytes").type)
    return is_binary(one)


def _holds_turns(kind: pa.DataType) -> bool:
    if is_text(kind):
        return True
    if pa.types.is_struct(kind):
        return kind.num_fields > 0 and all(is_list(field.type) for field in kind)
    return is_list(kind) and pa.types.is_struct(kind.value_type)


_TEXTS = {
    "caption": (is_text, "text"),
    "conversation": (
        _holds_turns,
        "a list of {role, content}, {from, value} or {user, assistant}, or such a list as JSON text",
    ),
}
