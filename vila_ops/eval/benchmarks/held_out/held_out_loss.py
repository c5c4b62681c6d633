"""Loss of held-out samples of any kind; see `config.eval.HeldOutLoss`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vila_ops.config.eval import HeldOutLoss
from vila_ops.eval.benchmark import Aggregate, EvalInputs, Intervals, Scored, ScoreRequest, tables
from vila_ops.eval.benchmarks.held_out.items import SampleItem, sample_items
from vila_ops.eval.benchmarks.held_out.prompts import ROLES, check_tokenizer, prompt_of, shown_by_condition
from vila_ops.eval.report import ItemScore, MetricRole
from vila_ops.generate.request import Loglikelihood

if TYPE_CHECKING:
    from vila_ops.data.text.conversation import Tokenizer

REVISION = 2
NAME, UNIT = "held_out_loss", "nats per token"


def items(inputs: EvalInputs, config: HeldOutLoss, tokenizer: "Tokenizer") -> tuple[SampleItem, ...]:
    """The held-out samples. Raises ValueError where they are of another tokenizer."""
    samples = sample_items(inputs, None, with_images=config.control == "shuffled")
    check_tokenizer(samples, tokenizer)
    return samples


def requests(items: Sequence[SampleItem], config: HeldOutLoss, tokenizer: "Tokenizer") -> dict[str, list[ScoreRequest]]:
    """The likelihood of each run of target tokens after everything before it, item after item."""
    return {
        condition: [
            ScoreRequest(prompt_of(item, start, images, tokenizer), (item.input_ids[start:stop],))
            for item, images in zip(items, shown, strict=True)
            for start, stop in item.spans
        ]
        for condition, shown in shown_by_condition(items, config.control).items()
    }


def score(
    items: Sequence[SampleItem], config: HeldOutLoss, responses: Mapping[str, Sequence[list[Loglikelihood]]]
) -> Scored:
    """Nats and tokens of each sample."""
    left = {condition: iter(given) for condition, given in responses.items()}
    scores = []
    for item in items:
        by_role: dict[MetricRole, dict[str, float]] = {}
        for condition, given in left.items():
            parts = [next(given)[0] for _ in item.spans]
            by_role[ROLES[condition]] = {
                "nats": sum(part.nll for part in parts),
                "tokens": sum(part.tokens for part in parts),
            }
        scores.append(ItemScore(item=item.key, cluster=item.object, scores=by_role))
    return Scored(tuple(scores))


def aggregate(scores: Sequence[ItemScore], config: HeldOutLoss, intervals: Intervals) -> Aggregate:
    """All nats by all tokens, of the matched and of the shuffled images, and the gap between the two."""
    return Aggregate(intervals.metrics(NAME, tables(scores), statistic="ratio", unit=UNIT))
