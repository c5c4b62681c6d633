"""Choice of a word's meaning among four, text only; see `config.eval.TextMultipleChoice`."""

from collections.abc import Mapping, Sequence

import numpy as np

from vila_ops.config.eval import TextMultipleChoice
from vila_ops.eval.benchmark import LazyTokenizer, MetricValues, ScoreRequest, Units
from vila_ops.eval.benchmarks.held_out.items import HeldOut, WordItem, word_items
from vila_ops.eval.benchmarks.held_out.prompts import column_values
from vila_ops.eval.metrics.choice import share_right
from vila_ops.eval.rows import ItemRow
from vila_ops.generate.request import Prompt

REVISION = 5
NAME, UNIT = "text_multiple_choice", "share right"


def read(source: HeldOut, config: TextMultipleChoice) -> tuple[WordItem, ...]:
    """The held-out words."""
    return word_items(source.inputs)


def requests(items: Sequence[WordItem], config: TextMultipleChoice, tokenizer: LazyTokenizer) -> list[ScoreRequest]:
    """The likelihoods of the four meanings after "word:"."""
    text_ids = tokenizer().text_ids
    return [
        ScoreRequest(
            item=item.id,
            prompt=Prompt([*tokenizer().bos, *text_ids(f"{item.word}:")]),
            continuations=tuple(text_ids(f" {meaning}") for meaning in (item.meaning, *item.distractors)),
        )
        for item in items
    ]


def score(items: Sequence[WordItem], rows: Sequence[ItemRow], config: TextMultipleChoice) -> list[Mapping[str, float]]:
    """1 where the true meaning, which comes first, has the highest log-likelihood per token."""
    return [{"right": share_right(_per_token(row), item=row.item)} for row in rows]


def _per_token(row: ItemRow) -> list[float]:
    return [-nats / tokens for nats, tokens in zip(row.response.nats, row.response.tokens, strict=True)]


def metrics(items: Sequence[WordItem], rows: Sequence[ItemRow], config: TextMultipleChoice) -> list[MetricValues]:
    """The share of words with the right choice, and the chance level of a quarter."""
    chance = np.full(len(rows), 1 / 4)
    return [
        *column_values(NAME, rows, ("right",), unit=UNIT),
        MetricValues(NAME, Units.of(rows), chance, role="chance", unit=UNIT),
    ]
