"""Choice of an image's caption among four; see `config.eval.MultipleChoice`."""

from collections.abc import Mapping, Sequence

import numpy as np

from vila_ops.config.eval import MultipleChoice
from vila_ops.eval.benchmark import LazyTokenizer, MetricValues, ScoreRequest, Units
from vila_ops.eval.benchmarks.held_out.items import HeldOut, ImageItem, image_items
from vila_ops.eval.benchmarks.held_out.prompts import caption_requests, column_values, of_condition, shown_images
from vila_ops.eval.metrics.choice import share_right
from vila_ops.eval.rows import ItemRow

REVISION = 6
NAME, UNIT = "multiple_choice", "share right"


def read(source: HeldOut, config: MultipleChoice) -> tuple[ImageItem, ...]:
    """The held-out images. Raises ValueError for one with fewer than three captions to choose from beside its own."""
    items = image_items(source.inputs, config.objects)
    if few := next((item for item in items if len(item.distractors) < 3), None):
        raise ValueError(
            f"item {few.id!r}: only {len(few.distractors)} held-out captions differ from {few.caption!r}; enlarge the "
            f"split, or leave multiple_choice out of the suite"
        )
    return items


def requests(items: Sequence[ImageItem], config: MultipleChoice, tokenizer: LazyTokenizer) -> list[ScoreRequest]:
    """The likelihoods of the four captions given the matched, the shuffled and no image."""
    images: dict[str, Sequence[bytes | None]] = {**shown_images(items, config.control)}
    images["no_image"] = [None] * len(items)
    return caption_requests(items, images, tokenizer())


def score(items: Sequence[ImageItem], rows: Sequence[ItemRow], config: MultipleChoice) -> list[Mapping[str, float]]:
    """What the true caption, which comes first, gains in log-likelihood from the image, compared with the others.

    right: 1 where it gains most. margin: its gain less the mean gain of the others, in nats. A row without an image has
    no score, and neither has one whose item has no answer without an image.
    """
    without = {row.item: row.response.nats for row in rows if row.condition == "no_image"}
    return [
        {}
        if row.condition == "no_image" or row.item not in without
        else _scores(row.response.nats, without[row.item], row.item)
        for row in rows
    ]


def _scores(nats: Sequence[float], without: Sequence[float], item: str) -> dict[str, float]:
    true, *others = gains = [base - one for base, one in zip(without, nats, strict=True)]
    return {"right": share_right(gains, item=item), "margin": true - sum(others) / len(others)}


def metrics(items: Sequence[ImageItem], rows: Sequence[ItemRow], config: MultipleChoice) -> list[MetricValues]:
    """The share of images with the right choice, the chance level of a quarter, and the margin in nats."""
    own = of_condition(rows)["model"]
    chance = np.full(len(own), 1 / 4)
    return [
        *column_values(NAME, rows, ("right",), unit=UNIT),
        MetricValues(NAME, Units.of(own), chance, role="chance", unit=UNIT),
        *column_values(f"{NAME}_margin", rows, ("margin",), unit="nats"),
    ]
