"""Tables among a run's artifacts, as MLflow's `log_table` writes them, so that its page compares them across runs.

A table is JSON of columns and rows, and a tag of the run names all of them. `log_table` itself appends to a table that
is there, so that a retry would double its rows; here a table is replaced.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from vila_ops.tracking.outbox import MetricLog

TABLES_TAG = "mlflow.loggedArtifacts"
IMAGES = "table_images"
Cell = str | float | bytes | None
"""bytes are a JPEG; MLflow needs an image in each row of a column that has one."""


@dataclass(frozen=True)
class LoggedTable:
    """Rows under named columns."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def log_tables(metrics: MetricLog, tables: Mapping[str, LoggedTable]) -> None:
    """Attach all tables of a run, by their paths among its artifacts (`FOLDER/NAME.json`)."""
    files: dict[str, bytes] = {}
    for path, table in tables.items():
        rows = [[_cell(cell, path, files) for cell in row] for row in table.rows]
        files[path] = json.dumps({"columns": table.columns, "data": rows}, ensure_ascii=False).encode()
    metrics.put_files(files)
    metrics.tag(TABLES_TAG, json.dumps([{"path": path, "type": "table"} for path in tables]))


def _cell(cell: Cell, table: str, files: dict[str, bytes]) -> Any:
    """The JSON value of a cell. An image is added to the files: a table names where it lies."""
    if not isinstance(cell, bytes):
        return cell
    place = PurePosixPath(IMAGES) / PurePosixPath(table).with_suffix("") / hashlib.sha256(cell).hexdigest()[:16]
    files[f"{place}.jpg"] = cell
    return {"type": "image", "filepath": f"{place}.jpg", "compressed_filepath": f"{place}.jpg"}
