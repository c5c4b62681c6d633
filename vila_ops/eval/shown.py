"""Rows of the items table as a person reads them: what the target was shown, reference, answer and score."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image as Pillow

from vila_ops.data.containers import BadImage
from vila_ops.data.images import rgb
from vila_ops.data.records import Image
from vila_ops.eval.benchmark import Item, MetricValues, Parts, Request, SealedImage, TextPrompt
from vila_ops.eval.prompts import ImageOf
from vila_ops.eval.rows import ItemRow
from vila_ops.eval.statistics import cluster_sums
from vila_ops.generate.request import Prompt

if TYPE_CHECKING:
    from vila_ops.eval.benchmark import LazyTokenizer

QUALITY = 80
"""Of JPEG thumbnails."""
GAP = 6
"""Pixels between images side by side."""


@dataclass(frozen=True)
class ShownRow:
    """A row of the items table with its prompt."""

    row: ItemRow
    turns: tuple[tuple[str, Parts], ...]
    """(role, texts and images in their order): demonstrations, and last the question."""
    reference: str
    score: float | None
    """See `item_scores`."""

    @property
    def question(self) -> Parts:
        """The last turn: what is asked about the item."""
        return self.turns[-1][1]


def shown_rows(
    requests: Sequence[Request],
    items: Sequence[Item],
    rows: Sequence[ItemRow],
    scores: Mapping[str, float],
    tokenizer: "LazyTokenizer",
) -> list[ShownRow]:
    """The rows of a benchmark with their prompts, in the order of the rows; `scores` are those of the items."""
    request_of = {(one.item, one.condition, one.rotation): one for one in requests}
    references = {item.id: reference_of(item) for item in items}
    return [
        ShownRow(
            row,
            _turns(request_of[row.item, row.condition, row.rotation], tokenizer),
            references[row.item],
            scores.get(row.item) if row.condition == "matched" else None,
        )
        for row in rows
    ]


def item_scores(values: Sequence[MetricValues]) -> dict[str, float]:
    """One number for each item, larger for a better answer: the first metric of the model that an item has a value of.

    That is the metric's statistic of this item alone, with its sign changed where lower is better. A statistic that a
    single item does not have, such as F1 of a rejected object, gives none.
    """
    scores: dict[str, float] = {}
    for one in values:
        names = set(one.units.names)
        if one.role != "model" or one.layer is not None or len(names) < 2 or names <= scores.keys():
            continue
        sums, function = cluster_sums(one.values, one.units.names, one.statistic)
        with np.errstate(divide="ignore", invalid="ignore"):
            numbers = function(sums)
        sign = -1 if one.lower_is_better else 1
        for name, number in zip(sorted(names), numbers.tolist(), strict=True):
            if np.isfinite(number):
                scores.setdefault(name, sign * number)
    return scores


def reference_of(item: Item) -> str:
    """What the item's answer should be: the answer of a demonstration, or the references as JSON."""
    if item.answer or item.references is None:
        return item.answer
    return json.dumps(item.references, ensure_ascii=False)


def text_of(parts: Parts) -> str:
    """The texts of a prompt, with a mark for each image."""
    return "".join(part if isinstance(part, str) else "<image>" for part in parts).strip()


def images_of(parts: Parts, image_of: ImageOf) -> list[bytes]:
    """The files of the images of a prompt that can be read."""
    return [
        part.data if isinstance(part, Image) else image_of(part)
        for part in parts
        if isinstance(part, (Image, SealedImage))
    ]


def thumbnail(images: Sequence[bytes], side: int) -> bytes | None:
    """Images side by side as one JPEG, each with sides of at most `side` pixels; None where one cannot be read."""
    try:
        small = [rgb(data, at_least=side) for data in images]
    except BadImage:
        return None
    for image in small:
        image.thumbnail((side, side))
    width = sum(image.width for image in small) + GAP * (len(small) - 1)
    whole = Pillow.new("RGB", (width, max(image.height for image in small)), "white")
    left = 0
    for image in small:
        whole.paste(image, (left, 0))
        left += image.width + GAP
    out = io.BytesIO()
    whole.save(out, "JPEG", quality=QUALITY)
    return out.getvalue()


def _turns(request: Request, tokenizer: "LazyTokenizer") -> tuple[tuple[str, Parts], ...]:
    prompt = request.prompt
    return prompt.turns if isinstance(prompt, TextPrompt) else (("document", _decoded(prompt, tokenizer)),)


def _decoded(prompt: Prompt, tokenizer: "LazyTokenizer") -> Parts:
    """The texts and images of a prompt of token ids."""
    known, images = tokenizer(), iter(prompt.images)
    parts: list[str | Image] = []
    for is_image, run in groupby(prompt.input_ids, key=lambda token: token == known.image_id):
        ids = list(run)
        if is_image:
            parts += [Image(next(images)) for _ in range(len(ids) // known.image_tokens)]
        else:
            parts.append(known.fast.decode(ids, skip_special_tokens=True))
    return tuple(part for part in parts if part)
