"""Loss of captions given their images; see `config.eval.CaptionLoss`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vila_ops.config.eval import CaptionLoss
from vila_ops.eval.benchmark import Aggregate, EvalInputs, Intervals, Scored, ScoreRequest, tables
from vila_ops.eval.benchmarks.held_out.items import ImageItem, image_items
from vila_ops.eval.benchmarks.held_out.prompts import ROLES, caption_requests, shown_images
from vila_ops.eval.report import ItemScore
from vila_ops.generate.request import Loglikelihood

if TYPE_CHECKING:
    from vila_ops.data.text.conversation import Tokenizer

REVISION = 3
NAME, UNIT = "caption_loss", "nats per token"


def items(inputs: EvalInputs, config: CaptionLoss, tokenizer: "Tokenizer") -> tuple[ImageItem, ...]:
    """The held-out images."""
    return image_items(inputs)


def requests(items: Sequence[ImageItem], config: CaptionLoss, tokenizer: "Tokenizer") -> dict[str, list[ScoreRequest]]:
    """The requests of `multiple_choice`, distractors included, so that a suite with both reads each image once."""
    images = shown_images(items, config.control)
    return {condition: caption_requests(items, shown, tokenizer) for condition, shown in images.items()}


def score(
    items: Sequence[ImageItem], config: CaptionLoss, responses: Mapping[str, Sequence[list[Loglikelihood]]]
) -> Scored:
    """Nats and tokens of each true caption."""
    return Scored(
        tuple(
            ItemScore(
                item=item.key,
                cluster=item.object,
                scores={
                    ROLES[condition]: {"nats": given[number][0].nll, "tokens": given[number][0].tokens}
                    for condition, given in responses.items()
                },
            )
            for number, item in enumerate(items)
        )
    )


def aggregate(scores: Sequence[ItemScore], config: CaptionLoss, intervals: Intervals) -> Aggregate:
    """All nats by all tokens, of the matched and of the shuffled images, and the gap between the two."""
    return Aggregate(intervals.metrics(NAME, tables(scores), statistic="ratio", unit=UNIT))
