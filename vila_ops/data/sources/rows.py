"""Parquet files with one record a row: those of a span, a few at a time.

In memory is a page of each column, however large a row group is; pyarrow writes pages of up to 1024 rows.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vila_ops.data.raw.files import Span
from vila_ops.data.sources.faults import Fault

BATCH_ROWS = 16
BUFFER_BYTES = 2**20
"""Columns are read through a buffer of so many bytes, not a row group's worth at once; a page is decoded whole."""


def open_parquet(path: Path) -> pq.ParquetFile:
    """The file; its footer is all that is read. Raises ValueError where it is damaged or of another format."""
    try:
        return pq.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} is not a readable Parquet file ({error}); it may be cut off: fetch it anew"
        ) from error


def rows(span: Span, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any] | Fault]]:
    """("FILE:NUMBER", row) of each row of a span, NUMBER from 1; a Fault where it cannot be read.

    A row group is decoded from its first row on: a file of one huge row group is read more than once where it is cut
    into many spans.
    """
    with open_parquet(Path(span.path)) as file:
        after = 0
        for group in range(file.num_row_groups):
            before, after = after, after + file.metadata.row_group(group).num_rows
            start, stop = max(before, span.start), min(after, span.stop)
            if start < stop:
                found = _group_rows(file, group, columns, start - before)
                for number in range(start, stop):
                    yield f"{span.name}:{number + 1}", next(found)


def _group_rows(
    file: pq.ParquetFile, group: int, columns: Sequence[str], skipped: int
) -> Iterator[dict[str, Any] | Fault]:
    """The rows of one row group without the first so many, and faults without end where its pages are damaged."""
    try:
        for batch in file.iter_batches(batch_size=BATCH_ROWS, row_groups=[group], columns=list(columns)):
            for row in range(min(skipped, batch.num_rows), batch.num_rows):
                yield _row(batch.slice(row, 1))
            skipped = max(0, skipped - batch.num_rows)
        problem = "it has fewer rows than the footer says"
    except (pa.ArrowException, OSError) as error:
        problem = str(error)
    while True:
        yield Fault("damaged_rows", f"row group {group} cannot be read on from here: {problem}; fetch the file anew")


def _row(batch: pa.RecordBatch) -> dict[str, Any] | Fault:
    try:
        row: dict[str, Any] = batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return Fault("invalid_utf8", f"text that is not UTF-8: byte {error.start} ({error.reason})")
    return row


def is_text(kind: pa.DataType) -> bool:
    """Whether a column is of text."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def number_columns(schema: pa.Schema) -> list[str]:
    """The names of the columns of numbers."""
    return [field.name for field in schema if pa.types.is_floating(field.type) or pa.types.is_integer(field.type)]
