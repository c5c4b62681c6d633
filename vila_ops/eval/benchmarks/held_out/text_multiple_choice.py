"""Choice of a word's meaning among four, text only; see `config.eval.TextMultipleChoice`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vila_ops.config.eval import TextMultipleChoice
from vila_ops.eval.benchmark import Aggregate, EvalInputs, Intervals, Scored, ScoreRequest, chance, tables
from vila_ops.eval.benchmarks.held_out.items import WordItem, word_items
from vila_ops.eval.metrics.choice import share_right
from vila_ops.eval.report import ItemScore
from vila_ops.generate.request import Loglikelihood, Prompt

if TYPE_CHECKING:
    from vila_ops.data.text.conversation import Tokenizer

REVISION = 3
NAME, UNIT = "text_multiple_choice", "share right"


def items(inputs: EvalInputs, config: TextMultipleChoice, tokenizer: "Tokenizer") -> tuple[WordItem, ...]:
    """The held-out words."""
    return word_items(inputs)


def requests(
    items: Sequence[WordItem], config: TextMultipleChoice, tokenizer: "Tokenizer"
) -> dict[str, list[ScoreRequest]]:
    """The likelihoods of the four meanings after "word:"."""
    return {
        "no_image": [
            ScoreRequest(
                Prompt([*tokenizer.bos, *tokenizer.text_ids(f"{item.word}:")]),
                tuple(tokenizer.text_ids(f" {meaning}") for meaning in (item.meaning, *item.distractors)),
            )
            for item in items
        ]
    }


def score(
    items: Sequence[WordItem], config: TextMultipleChoice, responses: Mapping[str, Sequence[list[Loglikelihood]]]
) -> Scored:
    """1 where the true meaning, which comes first, has the highest log-likelihood per token."""
    scores = []
    for item, options in zip(items, responses["no_image"], strict=True):
        right = share_right([-option.nll / option.tokens for option in options], item=item.key)
        scores.append(ItemScore(item=item.key, cluster=item.key, scores={"model": {"right": right}}))
    return Scored(tuple(scores))


def aggregate(scores: Sequence[ItemScore], config: TextMultipleChoice, intervals: Intervals) -> Aggregate:
    """The share of words with the right choice, and the chance level of a quarter."""
    model = tables(scores)["model"]
    return Aggregate(
        (
            intervals.metric(NAME, "model", model, statistic="mean", unit=UNIT),
            chance(NAME, 1 / 4, n=len(scores), unit=UNIT),
        )
    )
