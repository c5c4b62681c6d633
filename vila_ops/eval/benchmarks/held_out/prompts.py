"""Prompts and requests that several of these benchmarks make, in the format of the training data."""

import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from vila_ops.config.eval import Control
from vila_ops.eval.benchmark import MetricValues, ScoreRequest, Units
from vila_ops.eval.benchmarks.held_out.items import ImageItem, SampleItem
from vila_ops.eval.report import MetricRole
from vila_ops.eval.rows import ItemRow
from vila_ops.eval.statistics import PER_TOKEN
from vila_ops.generate.request import Prompt

if TYPE_CHECKING:
    from vila_ops.data.text.conversation import Tokenizer

ROLES: dict[str, MetricRole] = {"matched": "model", "shuffled": "control"}
"""The role that the scores of a condition have."""


def shown_images(items: Sequence[ImageItem], control: Control) -> dict[str, list[bytes]]:
    """The image of each item by condition: `matched`, and `shuffled` where there is a control."""
    images = {"matched": [item.image for item in items]}
    return images if control == "none" else {**images, "shuffled": [item.shuffled_image for item in items]}


def caption_prompt(tokenizer: "Tokenizer", image: bytes | None) -> Prompt:
    """What precedes a caption in the training pairs: bos, and the image unless it is None."""
    if image is None:
        return Prompt(tokenizer.context)
    return Prompt([*tokenizer.bos, *tokenizer.image], (image,))


def caption_requests(
    items: Sequence[ImageItem], images: Mapping[str, Sequence[bytes | None]], tokenizer: "Tokenizer"
) -> list[ScoreRequest]:
    """The likelihoods of each item's true caption, which comes first, and of its distractors, given each image."""
    return [
        ScoreRequest(
            item=item.id,
            condition=condition,
            prompt=caption_prompt(tokenizer, image),
            continuations=tuple(
                [*tokenizer.text_ids(text), tokenizer.eos_id] for text in (item.caption, *item.distractors)
            ),
        )
        for condition, shown in images.items()
        for item, image in zip(items, shown, strict=True)
    ]


def of_condition(rows: Sequence[ItemRow]) -> dict[MetricRole, list[ItemRow]]:
    """The rows of the model and of its control that have scores, by role."""
    by_role: dict[MetricRole, list[ItemRow]] = {}
    for row in rows:
        if row.condition in ROLES and row.scores:
            by_role.setdefault(ROLES[row.condition], []).append(row)
    return by_role


def column_values(name: str, rows: Sequence[ItemRow], columns: Sequence[str], *, unit: str) -> list[MetricValues]:
    """The mean of one column, for the model and its control."""
    return [
        MetricValues(name, Units.of(own), np.array([row.scores[column] for row in own]), role=role, unit=unit)
        for role, own in of_condition(rows).items()
        for column in columns
    ]


def loss_values(name: str, rows: Sequence[ItemRow]) -> list[MetricValues]:
    """All nats by all tokens, for the model and its control; the rows of an item are summed."""
    values = []
    for role, own in of_condition(rows).items():
        sums: dict[str, list[float]] = {}
        for row in own:
            item = sums.setdefault(row.item, [0.0, 0.0])
            item[0], item[1] = item[0] + row.scores["nats"], item[1] + row.scores["tokens"]
        groups = {row.item: row.group for row in own}
        units = Units(tuple(sums), tuple(groups[item] for item in sums))
        table = np.array(list(sums.values()))
        values.append(MetricValues(name, units, table, "ratio", role=role, unit=PER_TOKEN, lower_is_better=True))
    return values


def shown_by_condition(items: Sequence[SampleItem], control: Control) -> dict[str, list[tuple[bytes, ...]]]:
    """The images of each sample by condition, as in `shown_images`."""
    images = {"matched": [item.images for item in items]}
    return images if control == "none" else {**images, "shuffled": [item.shuffled_images for item in items]}


def prompt_of(item: SampleItem, stop: int, images: Sequence[bytes], tokenizer: "Tokenizer") -> Prompt:
    """The first `stop` tokens of a sample, with the images that stand among them."""
    ids = item.input_ids[:stop]
    return Prompt(ids, tuple(images[: ids.count(tokenizer.image_id) // tokenizer.image_tokens]))


def check_tokenizer(items: Sequence[SampleItem], tokenizer: "Tokenizer") -> None:
    """Raise ValueError for samples of another tokenizer, by which none of their targets is in their text."""

    def plain(text: str) -> str:
        return "".join(unicodedata.normalize("NFKC", text).casefold().split())

    targets = ((plain(tokenizer.decode(item.input_ids[slice(*span)])), item) for item in items for span in item.spans)
    if items and not any(target and target in plain(item.text) for target, item in targets):
        raise ValueError(
            "the held-out samples were tokenised for another model, whose tokenizer differs from this one's; evaluate "
            "a model of the recipe that prepared them"
        )
