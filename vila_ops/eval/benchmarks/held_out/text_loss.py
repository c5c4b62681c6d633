"""Loss of held-out plain text; see `config.eval.TextLoss`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vila_ops.config.eval import TextLoss
from vila_ops.eval.benchmark import Aggregate, EvalInputs, Intervals, Scored, ScoreRequest, tables
from vila_ops.eval.benchmarks.held_out.items import WordItem, word_items
from vila_ops.eval.report import ItemScore
from vila_ops.generate.request import Loglikelihood, Prompt

if TYPE_CHECKING:
    from vila_ops.data.text.conversation import Tokenizer

REVISION = 3
NAME, UNIT = "text_loss", "nats per token"


def items(inputs: EvalInputs, config: TextLoss, tokenizer: "Tokenizer") -> tuple[WordItem, ...]:
    """The held-out words."""
    return word_items(inputs)


def requests(items: Sequence[WordItem], config: TextLoss, tokenizer: "Tokenizer") -> dict[str, list[ScoreRequest]]:
    """The likelihood of "word: meaning" as running text."""
    texts = [tokenizer.text_ids(f"{item.word}: {item.meaning}") for item in items]
    return {"no_image": [ScoreRequest(Prompt(tokenizer.context), (text,)) for text in texts]}


def score(
    items: Sequence[WordItem], config: TextLoss, responses: Mapping[str, Sequence[list[Loglikelihood]]]
) -> Scored:
    """Nats and tokens of each text."""
    return Scored(
        tuple(
            ItemScore(item=item.key, cluster=item.key, scores={"model": {"nats": text.nll, "tokens": text.tokens}})
            for item, (text,) in zip(items, responses["no_image"], strict=True)
        )
    )


def aggregate(scores: Sequence[ItemScore], config: TextLoss, intervals: Intervals) -> Aggregate:
    """All nats by all tokens."""
    model = tables(scores)["model"]
    return Aggregate((intervals.metric(NAME, "model", model, statistic="ratio", unit=UNIT),))
