"""CIDEr-D of generated captions; see `config.eval.CaptionCider`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vila_ops.config.eval import CaptionCider
from vila_ops.eval.benchmark import Aggregate, EvalInputs, GenerateRequest, Intervals, Scored, tables
from vila_ops.eval.benchmarks.held_out.items import ImageItem, frequent_caption, image_items
from vila_ops.eval.benchmarks.held_out.prompts import caption_prompt, shown_images
from vila_ops.eval.metrics.cider import cider
from vila_ops.eval.report import ItemAnswer, ItemScore, MetricRole

if TYPE_CHECKING:
    from vila_ops.data.text.conversation import Tokenizer

REVISION = 3
NAME, UNIT = "cider", "CIDEr-D (0 to 10)"


@dataclass(frozen=True)
class CaptionItem:
    """A held-out image and the caption of the chance level."""

    image: ImageItem
    frequent_caption: str
    """The most frequent training caption, the same for all items."""


def items(inputs: EvalInputs, config: CaptionCider, tokenizer: "Tokenizer") -> tuple[CaptionItem, ...]:
    """The held-out images. Raises ValueError without a training caption."""
    frequent = frequent_caption(inputs)
    return tuple(CaptionItem(image, frequent) for image in image_items(inputs))


def requests(
    items: Sequence[CaptionItem], config: CaptionCider, tokenizer: "Tokenizer"
) -> dict[str, list[GenerateRequest]]:
    """A caption of each matched and each shuffled image."""
    images = shown_images([item.image for item in items], config.control)
    return {
        condition: [GenerateRequest(caption_prompt(tokenizer, image), config.max_new_tokens) for image in shown]
        for condition, shown in images.items()
    }


def score(items: Sequence[CaptionItem], config: CaptionCider, responses: Mapping[str, Sequence[str]]) -> Scored:
    """CIDEr-D of each caption; its inverse document frequencies are those of all items' true captions."""
    captions: dict[MetricRole, list[str]] = {
        "model": [text.strip() for text in responses["matched"]],
        "chance": [item.frequent_caption for item in items],
    }
    if config.control == "shuffled":
        captions["control"] = [text.strip() for text in responses["shuffled"]]
    references = {item.image.key: [item.image.caption] for item in items}
    by_role = {
        role: cider(dict(zip(references, texts, strict=True)), references).items for role, texts in captions.items()
    }
    return Scored(
        items=tuple(
            ItemScore(
                item=item.image.key,
                cluster=item.image.object,
                scores={role: {"cider": by_item[item.image.key]} for role, by_item in by_role.items()},
            )
            for item in items
        ),
        answers=tuple(
            ItemAnswer(
                key=item.image.key,
                object=item.image.object,
                truth=item.image.caption,
                answer=captions["model"][number],
                control=captions["control"][number] if "control" in captions else None,
            )
            for number, item in enumerate(items)
        ),
    )


def aggregate(scores: Sequence[ItemScore], config: CaptionCider, intervals: Intervals) -> Aggregate:
    """The mean of the items for the model, the chance level and the shuffled images, and the gap to the latter."""
    return Aggregate(intervals.metrics(NAME, tables(scores), statistic="mean", unit=UNIT))
