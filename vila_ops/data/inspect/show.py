"""A page of samples as the model reads them: images in place, target tokens in colour, token counts."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vila_ops.artifacts import output, store
from vila_ops.artifacts.kinds import Dataset
from vila_ops.data.preprocess.summary import SUMMARY
from vila_ops.data.shards import Sample, data_url, index_of, samples_of
from vila_ops.data.text.conversation import Tokenizer


@dataclass(frozen=True)
class Piece:
    """Consecutive target tokens, consecutive context tokens, or one image of a sample."""

    kind: str
    """target, context or image."""
    tokens: int
    text: str = ""
    address: str = ""
    """data: URL of the image."""


@dataclass(frozen=True)
class ShownSample:
    """One sample on the page."""

    row: dict[str, Any]
    """Its row of the index."""
    provenance: str
    pieces: list[Piece]


def show(dataset: Dataset, tokenizer: Tokenizer, out: Path, *, per_source: int) -> Path:
    """Write a page with the first samples of each source and split, in the order of the dataset.

    Raises ValueError if `out` exists and is not such a page.
    """
    rows = _chosen(index_of(dataset), per_source)
    groups: dict[str, list[ShownSample]] = {}
    for row, sample in zip(rows, samples_of(dataset, rows), strict=True):
        groups.setdefault(row["source"], []).append(
            ShownSample(row, sample.provenance, list(_pieces(sample, tokenizer)))
        )
    name = json.loads(store.file(dataset, SUMMARY).read_text())["mixture"]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("show.html.jinja").render(dataset=dataset, groups=groups, name=name)
    output.write_file(out, page, begins=output.HTML)
    return out


def _chosen(index: pa.Table, per_source: int) -> list[dict[str, Any]]:
    """The first rows of the index for each source and split."""
    kept: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for batch in index.to_batches(max_chunksize=4096):
        for row in batch.to_pylist():
            group = kept.setdefault((row["source"], row["split"]), [])
            if len(group) < per_source:
                group.append(row)
    return [row for _, rows in sorted(kept.items()) for row in rows]


def _pieces(sample: Sample, tokenizer: Tokenizer) -> Iterator[Piece]:
    """The sample's tokens in order, with consecutive tokens of one kind as one piece."""
    images = iter(sample.images)
    places = [
        ("image" if token == tokenizer.image_id else "target" if is_target else "context", token)
        for token, is_target in zip(sample.input_ids, sample.is_target, strict=True)
    ]
    for kind, run in groupby(places, key=lambda place: place[0]):
        ids = [token for _, token in run]
        if kind != "image":
            yield Piece(kind, len(ids), text=tokenizer.fast.decode(ids, skip_special_tokens=False))
            continue
        for _ in range(len(ids) // tokenizer.image_tokens):  # images may be adjacent
            yield Piece(kind, tokenizer.image_tokens, address=data_url(next(images)))
