"""Choice of an image's caption among four; see `config.eval.MultipleChoice`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vila_ops.config.eval import MultipleChoice
from vila_ops.eval.benchmark import Aggregate, EvalInputs, Intervals, Scored, ScoreRequest, chance, tables
from vila_ops.eval.benchmarks.held_out.items import ImageItem, image_items
from vila_ops.eval.benchmarks.held_out.prompts import ROLES, caption_requests, shown_images
from vila_ops.eval.metrics.choice import share_right
from vila_ops.eval.report import ItemScore
from vila_ops.generate.request import Loglikelihood

if TYPE_CHECKING:
    from vila_ops.data.text.conversation import Tokenizer

REVISION = 3
NAME, UNIT = "multiple_choice", "share right"


def items(inputs: EvalInputs, config: MultipleChoice, tokenizer: "Tokenizer") -> tuple[ImageItem, ...]:
    """The held-out images. Raises ValueError for one with fewer than three captions to choose from beside its own."""
    items = image_items(inputs)
    if few := next((item for item in items if len(item.distractors) < 3), None):
        raise ValueError(
            f"item {few.key!r}: only {len(few.distractors)} held-out captions differ from {few.caption!r}; enlarge the "
            f"split, or leave multiple_choice out of the suite"
        )
    return items


def requests(
    items: Sequence[ImageItem], config: MultipleChoice, tokenizer: "Tokenizer"
) -> dict[str, list[ScoreRequest]]:
    """The likelihoods of the four captions given the matched, the shuffled and no image."""
    images = shown_images(items, config.control)
    by_condition = {condition: caption_requests(items, shown, tokenizer) for condition, shown in images.items()}
    return {**by_condition, "no_image": caption_requests(items, [None] * len(items), tokenizer)}


def score(
    items: Sequence[ImageItem], config: MultipleChoice, responses: Mapping[str, Sequence[list[Loglikelihood]]]
) -> Scored:
    """1 where the true caption, which comes first, gains more log-likelihood from the image than the others."""
    scores = []
    for number, item in enumerate(items):
        without = responses["no_image"][number]
        right = {}
        for condition, role in ROLES.items():
            if condition in responses:
                given = responses[condition][number]
                gains = [base.nll - one.nll for base, one in zip(without, given, strict=True)]
                right[role] = {"right": share_right(gains, item=item.key)}
        scores.append(ItemScore(item=item.key, cluster=item.object, scores=right))
    return Scored(tuple(scores))


def aggregate(scores: Sequence[ItemScore], config: MultipleChoice, intervals: Intervals) -> Aggregate:
    """The share of images with the right choice, the chance level of a quarter, and the gap to shuffled images."""
    by_role = tables(scores)
    metrics = [
        intervals.metric(NAME, "model", by_role["model"], statistic="mean", unit=UNIT),
        chance(NAME, 1 / 4, n=len(scores), unit=UNIT),
    ]
    if "control" in by_role:
        metrics += [
            intervals.metric(NAME, "control", by_role["control"], statistic="mean", unit=UNIT),
            intervals.gap(NAME, by_role["model"], by_role["control"], statistic="mean", unit=UNIT),
        ]
    return Aggregate(tuple(metrics))
