"""Prompts and requests that several of these benchmarks make, in the format of the training data."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vila_ops.config.eval import Control
from vila_ops.eval.benchmark import ScoreRequest
from vila_ops.eval.benchmarks.held_out.items import ImageItem
from vila_ops.eval.report import MetricRole
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
    items: Sequence[ImageItem], images: Sequence[bytes | None], tokenizer: "Tokenizer"
) -> list[ScoreRequest]:
    """The likelihoods of each item's true caption, which comes first, and of its distractors, given an image."""

    def continuation(text: str) -> list[int]:
        return [*tokenizer.text_ids(text), tokenizer.eos_id]

    return [
        ScoreRequest(
            caption_prompt(tokenizer, image), tuple(continuation(text) for text in (item.caption, *item.distractors))
        )
        for item, image in zip(items, images, strict=True)
    ]
