"""The items of a benchmark's result as tables for MLflow, whose page compares the answers of runs row by row.

items/NAME.json     the first rows: question, reference, answer, status and score
images/NAME.json    a few items, spread over the benchmark, with their images

Which rows are shown depends on the benchmark alone, so that two runs have the same. All rows are in `items.parquet`.
"""

import re
from collections.abc import Iterator, Sequence

from vila_ops.eval.prompts import ImageOf
from vila_ops.eval.shown import ShownRow, images_of, text_of, thumbnail
from vila_ops.tracking.tables import Cell, LoggedTable

MAX_ROWS = 2000
"""MLflow's page reads a whole table at once."""
MAX_IMAGES = 24
MAX_TEXT = 500
"""Characters of a cell."""
SIDE = 256
"""Pixels of the longer side of an image."""
COLUMNS = ("answer", "score", "status", "question", "reference", "group")
"""After the item, by which MLflow's page groups rows at first; what comes next is what it compares."""


def item_tables(name: str, rows: Sequence[ShownRow], image_of: ImageOf) -> dict[str, LoggedTable]:
    """The tables of a benchmark by their paths; without one of images where no item has a readable one."""
    file = re.sub(r"[^\w-]", "_", name)
    own = tuple((_label(row), *_cells(row)) for row in rows[:MAX_ROWS])
    tables = {f"items/{file}.json": LoggedTable(("item", *COLUMNS), own)}
    if with_images := tuple(_with_images(rows, image_of)):
        tables[f"images/{file}.json"] = LoggedTable(("item", "image", *COLUMNS), with_images)
    return tables


def _with_images(rows: Sequence[ShownRow], image_of: ImageOf) -> Iterator[tuple[Cell, ...]]:
    """The cells of a few rows with their images, one of a group."""
    asked = [row for row in rows if row.row.condition == "matched" and row.row.rotation == 0]
    first = list({row.row.group: row for row in reversed(asked)}.values())[::-1]
    for row in first[:: max(1, len(first) // MAX_IMAGES)][:MAX_IMAGES]:
        images = images_of(row.question, image_of)
        if images and (small := thumbnail(images, SIDE)):
            yield (_label(row), small, *_cells(row))


def _label(shown: ShownRow) -> str:
    """The item, and which of its requests it is where it has several."""
    row = shown.row
    condition = "" if row.condition == "matched" else f" ({row.condition})"
    return f"{row.item}{condition}{f' (rotation {row.rotation})' if row.rotation else ''}"


def _cells(shown: ShownRow) -> tuple[Cell, ...]:
    row = shown.row
    question, reference, answer = (_cut(text) for text in (text_of(shown.question), shown.reference, row.answer))
    return (answer, shown.score, row.response.status, question, reference, row.group)


def _cut(text: str | None) -> str | None:
    return text if text is None or len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}…"
