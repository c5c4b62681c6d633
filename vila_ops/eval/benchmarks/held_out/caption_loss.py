"""Loss of captions given their images; see `config.eval.CaptionLoss`."""

from collections.abc import Mapping, Sequence

from vila_ops.config.eval import CaptionLoss
from vila_ops.eval.benchmark import LazyTokenizer, MetricValues, ScoreRequest
from vila_ops.eval.benchmarks.held_out.items import HeldOut, ImageItem, image_items
from vila_ops.eval.benchmarks.held_out.prompts import caption_requests, loss_values, shown_images
from vila_ops.eval.rows import ItemRow

REVISION = 5
NAME = "caption_loss"


def read(source: HeldOut, config: CaptionLoss) -> tuple[ImageItem, ...]:
    """The held-out images."""
    return image_items(source.inputs, config.objects)


def requests(items: Sequence[ImageItem], config: CaptionLoss, tokenizer: LazyTokenizer) -> list[ScoreRequest]:
    """The requests of `multiple_choice`, distractors included, so that a suite with both reads each image once."""
    return caption_requests(items, dict(shown_images(items, config.control)), tokenizer())


def score(items: Sequence[ImageItem], rows: Sequence[ItemRow], config: CaptionLoss) -> list[Mapping[str, float]]:
    """Nats and tokens of each true caption."""
    return [{"nats": row.response.nats[0], "tokens": row.response.tokens[0]} for row in rows]


def metrics(items: Sequence[ImageItem], rows: Sequence[ItemRow], config: CaptionLoss) -> list[MetricValues]:
    """All nats by all tokens, of the matched and of the shuffled images."""
    return loss_values(NAME, rows)
