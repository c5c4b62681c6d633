"""Reading of official files: what is missing, faulty or of another version is named with its place and the way out."""

import base64
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vila_ops.data.containers import BadImage, strip
from vila_ops.data.records import Image
from vila_ops.eval.benchmark import Part, Unreadable


def text_of(file: Path) -> str:
    """The text of a file in UTF-8, without a byte order mark. Raises ValueError."""
    if not file.is_file():
        raise ValueError(f"{file} is missing; `vila-ops benchmark list` says where it comes from")
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 at byte {error.start}; fetch it again") from error


def json_of(file: Path) -> Any:
    """The content of a JSON file. Raises ValueError."""
    try:
        return json.loads(text_of(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON at line {error.lineno}: {error.msg}; fetch it again") from error


def records_of(file: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, or of a JSON array; more keys than named are allowed. Raises ValueError."""
    text = text_of(file)
    if text.lstrip().startswith("["):
        records = json_of(file)
    else:
        records = [_line(file, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    check_keys(file, records, keys)
    return list(records)


def _line(file: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: line {number} is not JSON: {error.msg}; fetch the file again") from error


def check_keys(file: Path, records: Sequence[Any], keys: Sequence[str]) -> None:
    """Raise ValueError for records that are no objects or lack a key, and for a file without records."""
    if not records:
        raise ValueError(f"{file} has no record; fetch it again")
    for number, record in enumerate(records, 1):
        lacking = [key for key in keys if key not in record] if isinstance(record, dict) else list(keys)
        if lacking:
            raise ValueError(f"{file}: record {number} has no {lacking[0]!r}; the file is of another version")


def table_of(file: Path, columns: Sequence[str], *, delimiter: str = "\t") -> list[dict[str, str]]:
    """The rows of a table with a header; more columns than named are allowed. Raises ValueError."""
    csv.field_size_limit(2**31 - 1)  # images in base64
    rows = list(csv.DictReader(io.StringIO(text_of(file), newline=""), delimiter=delimiter))
    check_keys(file, rows, columns)
    return rows


def image_of(file: Path) -> Part:
    """The image in a file, or why there is none."""
    if not file.is_file():
        return Unreadable(f"{file.name} is missing")
    return image_in(file.read_bytes(), file.name)


def image_in(data: bytes, name: str) -> Part:
    """An encoded image, or why it cannot be read; `name` is how the official files call it."""
    try:
        strip(data)
    except BadImage as error:
        return Unreadable(f"{name}: {error}")
    return Image(data)


def image_in_base64(text: str, name: str) -> Part:
    """An image that a table holds as base64, or why it cannot be read."""
    try:
        return image_in(base64.b64decode(text, validate=True), name)
    except ValueError as error:  # also characters beyond ASCII
        return Unreadable(f"{name}: not base64: {error}")


def parquet_of(file: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a parquet file; more columns than named are allowed. Raises ValueError."""
    import pyarrow as pa  # heavy
    import pyarrow.parquet as pq

    try:
        rows: list[dict[str, Any]] = pq.read_table(file).to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{file} is no parquet file: {error}; fetch it again") from error
    check_keys(file, rows, columns)
    return rows
