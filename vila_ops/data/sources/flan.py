"""FLAN: text-only instructions, a row of Parquet or a line of jsonl with `inputs` and `targets`.

Whitespace at the end of the question and the answer is removed, as in VILA's loader.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vila_ops.config.sources import Flan
from vila_ops.data.raw.files import Folders, RawFile, Scan, Span, paths, scan_files
from vila_ops.data.raw.objects import raw_path
from vila_ops.data.records import Dropped, Record, Turn
from vila_ops.data.sources.conversations import check_text
from vila_ops.data.sources.faults import Fault
from vila_ops.data.sources.json_files import own_id, read_objects, record, scan_objects, stated
from vila_ops.data.sources.media import refuse_unread
from vila_ops.data.sources.rows import media_columns, open_parquet, rows

COLUMNS = ("inputs", "targets")
TASKS = ("_task_name", "task", "_task_source")
"""Columns that name the task; the first that is present is the record's category."""
PARQUET = ".parquet"


def raw_files(source: Flan, folders: Folders, *, cache: Path) -> list[RawFile]:
    """The Parquet and jsonl files."""
    return scan_files(paths(raw_path(source.path), (PARQUET, ".jsonl", ".jsonl.gz")), "flan", _scan, cache=cache)


def read(source: Flan, folders: Folders, span: Span) -> Iterator[list[Record | Dropped]]:
    """The conversation of each row or line."""
    if not span.path.lower().endswith(PARQUET):
        yield from read_objects(span, lambda value, place: _record(source, value, place))
        return
    with open_parquet(span.file()) as file:
        schema = file.schema_arrow
    columns = [name for name in schema.names if name in (*COLUMNS, *TASKS, "id", "licence", "license")]
    columns += media_columns(schema, but=(*columns, *source.ignore))
    for number, (place, row) in enumerate(rows(span, columns), start=span.start):
        if not span.takes(number):
            yield []
        elif isinstance(row, Fault):
            yield [row.dropped(place, where=place)]
        else:
            yield [_record_or_dropped(source, row, place)]


def _record_or_dropped(source: Flan, row: dict[str, Any], place: str) -> Record | Dropped:
    try:
        return _record(source, row, place)
    except Fault as error:
        return error.dropped(own_id(row) or place, where=place)


def _record(source: Flan, value: dict[str, Any], place: str) -> Record:
    refuse_unread(value, read=(*COLUMNS, *TASKS), ignore=source.ignore)
    question, answer = (_text(value, column) for column in COLUMNS)
    check_text("user", question, number=1, images=0)
    check_text("assistant", answer, number=2, images=0)
    turns = (Turn("user", (question,)), Turn("assistant", (answer,)))
    plain = record(value, place, turns=turns, image=None, licence=source.licence)
    return replace(plain, category=stated(value, *TASKS))


def _text(value: Mapping[str, Any], column: str) -> str:
    text = value.get(column)
    if not isinstance(text, str):
        raise Fault("malformed_turns", f"{column!r} is {repr(text)[:80]}; inputs and targets are texts")
    return text.rstrip()


def _scan(path: Path) -> Scan:
    if not path.name.lower().endswith(PARQUET):
        return scan_objects(path, lambda _: [])
    with open_parquet(path) as file:
        if missing := [name for name in COLUMNS if name not in file.schema_arrow.names]:
            raise ValueError(f"{path} has no column {missing[0]!r}; it has {', '.join(file.schema_arrow.names)}")
        return Scan(count=file.metadata.num_rows, images=0)
