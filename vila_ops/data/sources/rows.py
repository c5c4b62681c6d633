"""Parquet files with one record in each row: the rows of a span, a few at a time.

One page of each column is in memory, however large a row group is; pyarrow writes pages of up to 1024 rows.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vila_ops.data.raw.files import Span
from vila_ops.data.raw.objects import for_arrow
from vila_ops.data.sources.faults import Fault
from vila_ops.data.sources.media import names_media
from vila_ops.errors import VilaError

BATCH_ROWS = 16
BUFFER_BYTES = 2**20
"""Columns are read through a buffer of this size instead of a whole row group at once; a page is decoded whole."""


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open the file and read its footer. Raises ValueError if it is damaged or of another format."""
    try:
        return pq.ParquetFile(for_arrow(path), buffer_size=BUFFER_BYTES, pre_buffer=False)
    except VilaError:  # of the store, not of the file
        raise
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} is not a readable Parquet file ({error}); it may be cut off: fetch it again"
        ) from error


def rows(span: Span, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any] | Fault]]:
    """("FILE:NUMBER", row) of each row of a span, NUMBER from 1; a Fault for a row that cannot be read.

    A row group is decoded from its first row on, so a file of one huge row group is read repeatedly if it is cut into
    many spans.
    """
    with open_parquet(span.file()) as file:
        after = 0
        for group in range(file.num_row_groups):
            before, after = after, after + file.metadata.row_group(group).num_rows
            start, stop = max(before, span.start), min(after, span.stop)
            if start < stop:
                group_rows = _group_rows(file, group, columns, start - before)
                for number in range(start, stop):
                    yield f"{span.name}:{number + 1}", next(group_rows)


def _group_rows(
    file: pq.ParquetFile, group: int, columns: Sequence[str], skipped: int
) -> Iterator[dict[str, Any] | Fault]:
    """The rows of one row group after the first `skipped`; endless faults once a page is damaged."""
    try:
        for batch in file.iter_batches(batch_size=BATCH_ROWS, row_groups=[group], columns=list(columns)):
            for row in range(min(skipped, batch.num_rows), batch.num_rows):
                yield _row(batch.slice(row, 1))
            skipped = max(0, skipped - batch.num_rows)
        problem = "it has fewer rows than the footer says"
    except VilaError:
        raise
    except (pa.ArrowException, OSError) as error:
        problem = str(error)
    while True:
        yield Fault("damaged_rows", f"row group {group} cannot be read from here on: {problem}; fetch the file again")


def _row(batch: pa.RecordBatch) -> dict[str, Any] | Fault:
    try:
        row: dict[str, Any] = batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return Fault("invalid_utf8", f"text that is not UTF-8: byte {error.start} ({error.reason})")
    return row


def is_text(kind: pa.DataType) -> bool:
    """Whether a column contains text, also as views (polars) or with a dictionary (categories of pandas)."""
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_binary(kind: pa.DataType) -> bool:
    """Whether a column contains bytes."""
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def is_list(kind: pa.DataType) -> bool:
    """Whether a column contains lists."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def holds_files(kind: pa.DataType) -> bool:
    """Whether a column has the type of `datasets`' Image or Audio feature, {bytes, path}, or a list of them."""
    one = kind.value_type if is_list(kind) else kind
    return bool(pa.types.is_struct(one) and one.get_field_index("bytes") >= 0)


def media_columns(schema: pa.Schema, *, but: Sequence[str]) -> list[str]:
    """The names of the columns that may contain media, by their type or their name, without those in `but`."""
    others = (field for field in schema if field.name not in but and not pa.types.is_primitive(field.type))
    return [field.name for field in others if holds_files(field.type) or names_media(field.name)]


def number_columns(schema: pa.Schema) -> list[str]:
    """The names of the numeric columns."""
    return [field.name for field in schema if pa.types.is_floating(field.type) or pa.types.is_integer(field.type)]
