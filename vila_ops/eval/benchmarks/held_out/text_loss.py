"""Loss of held-out plain text; see `config.eval.TextLoss`."""

from collections.abc import Mapping, Sequence

from vila_ops.config.eval import TextLoss
from vila_ops.eval.benchmark import LazyTokenizer, MetricValues, ScoreRequest
from vila_ops.eval.benchmarks.held_out.items import HeldOut, WordItem, word_items
from vila_ops.eval.benchmarks.held_out.prompts import loss_values
from vila_ops.eval.rows import ItemRow
from vila_ops.generate.request import Prompt

REVISION = 5
NAME = "text_loss"


def read(source: HeldOut, config: TextLoss) -> tuple[WordItem, ...]:
    """The held-out words."""
    return word_items(source.inputs)


def requests(items: Sequence[WordItem], config: TextLoss, tokenizer: LazyTokenizer) -> list[ScoreRequest]:
    """The likelihood of "word: meaning" as running text."""
    return [
        ScoreRequest(
            item=item.id,
            prompt=Prompt(tokenizer().context),
            continuations=(tokenizer().text_ids(f"{item.word}: {item.meaning}"),),
        )
        for item in items
    ]


def score(items: Sequence[WordItem], rows: Sequence[ItemRow], config: TextLoss) -> list[Mapping[str, float]]:
    """Nats and tokens of each text."""
    return [{"nats": row.response.nats[0], "tokens": row.response.tokens[0]} for row in rows]


def metrics(items: Sequence[WordItem], rows: Sequence[ItemRow], config: TextLoss) -> list[MetricValues]:
    """All nats by all tokens."""
    return loss_values(NAME, rows)
