"""CIDEr-D of generated captions; see `config.eval.CaptionCider`."""

from collections.abc import Mapping, Sequence

import numpy as np

from vila_ops.config.eval import CaptionCider
from vila_ops.eval.benchmark import GenerateRequest, LazyTokenizer, MetricValues, Units
from vila_ops.eval.benchmarks.held_out.items import CaptionItem, HeldOut, caption_items
from vila_ops.eval.benchmarks.held_out.prompts import caption_prompt, column_values, of_condition, shown_images
from vila_ops.eval.metrics.cider import cider
from vila_ops.eval.rows import ItemRow

REVISION = 5
NAME, UNIT = "cider", "CIDEr-D (0 to 10)"


def read(source: HeldOut, config: CaptionCider) -> tuple[CaptionItem, ...]:
    """The held-out images. Raises ValueError without a training caption."""
    return caption_items(source.inputs, config.objects)


def requests(items: Sequence[CaptionItem], config: CaptionCider, tokenizer: LazyTokenizer) -> list[GenerateRequest]:
    """A caption of each matched and each shuffled image."""
    return [
        GenerateRequest(
            item=item.id,
            condition=condition,
            prompt=caption_prompt(tokenizer(), image),
            max_new_tokens=config.max_new_tokens,
        )
        for condition, images in shown_images(items, config.control).items()
        for item, image in zip(items, images, strict=True)
    ]


def score(items: Sequence[CaptionItem], rows: Sequence[ItemRow], config: CaptionCider) -> list[Mapping[str, float]]:
    """CIDEr-D of each caption; its inverse document frequencies are those of the true captions of all its condition."""
    by_row: dict[tuple[str, str], float] = {}
    for condition in {row.condition for row in rows}:
        captions = {row.item: (row.answer or "").strip() for row in rows if row.condition == condition}
        scores = cider(captions, _references(items, captions)).items
        by_row |= {(item, condition): value for item, value in scores.items()}
    return [{"cider": by_row[row.item, row.condition]} for row in rows]


def metrics(items: Sequence[CaptionItem], rows: Sequence[ItemRow], config: CaptionCider) -> list[MetricValues]:
    """The mean of the items for the model, the shuffled images, and the most frequent training caption."""
    own = of_condition(rows)["model"]
    frequent = {row.item: items[0].frequent_caption for row in own}
    chance = cider(frequent, _references(items, frequent)).items
    return [
        *column_values(NAME, rows, ("cider",), unit=UNIT),
        MetricValues(NAME, Units.of(own), np.array([chance[row.item] for row in own]), role="chance", unit=UNIT),
    ]


def _references(items: Sequence[CaptionItem], captions: Mapping[str, str]) -> dict[str, list[str]]:
    """The true caption of each item that has a caption, in the order of the items."""
    return {item.id: [item.caption] for item in items if item.id in captions}
