"""Answers that equal the held-out ones; see `config.eval.AnswerMatch`."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from vila_ops.config.eval import AnswerMatch
from vila_ops.eval.benchmark import GenerateRequest, LazyTokenizer, MetricValues, Units
from vila_ops.eval.benchmarks.held_out.items import HeldOut, SampleItem, sample_items
from vila_ops.eval.benchmarks.held_out.prompts import check_tokenizer, column_values, prompt_of, shown_by_condition
from vila_ops.eval.metrics.answers import normalised
from vila_ops.eval.rows import ItemRow

REVISION = 4
NAME, UNIT = "answer_match", "share equal"


def read(source: HeldOut, config: AnswerMatch) -> tuple[SampleItem, ...]:
    """The held-out conversations, with their first answers. Raises ValueError where they are of another tokenizer."""
    samples = sample_items(source.inputs, source.inputs.conversations, with_images=config.control == "shuffled")
    tokenizer = source.tokenizer()
    check_tokenizer(samples, tokenizer)
    answers = [tokenizer.decode(one.input_ids[slice(*one.spans[0])]).strip() for one in samples]
    return tuple(
        replace(sample, answer=answer, references={"answer": answer})
        for sample, answer in zip(samples, answers, strict=True)
    )


def requests(items: Sequence[SampleItem], config: AnswerMatch, tokenizer: LazyTokenizer) -> list[GenerateRequest]:
    """The answer to each first question, with the matched and with the shuffled image."""
    return [
        GenerateRequest(
            item=item.id,
            condition=condition,
            prompt=prompt_of(item, item.spans[0][0], images, tokenizer()),
            max_new_tokens=config.max_new_tokens,
        )
        for condition, shown in shown_by_condition(items, config.control).items()
        for item, images in zip(items, shown, strict=True)
    ]


def score(items: Sequence[SampleItem], rows: Sequence[ItemRow], config: AnswerMatch) -> list[Mapping[str, float]]:
    """1 where an answer equals the held-out one."""
    truths = {item.id: normalised(item.answer) for item in items}
    return [{"equal": float(normalised(row.answer or "") == truths[row.item])} for row in rows]


def metrics(items: Sequence[SampleItem], rows: Sequence[ItemRow], config: AnswerMatch) -> list[MetricValues]:
    """The share of equal answers; the chance level answers what is most frequent among the held-out ones."""
    truths = [normalised(item.answer) for item in items]
    counts = Counter(truths)
    frequent = min(counts, key=lambda text: (-counts[text], text))
    units = Units(tuple(item.id for item in items), tuple(item.group for item in items))
    chance = np.array([float(truth == frequent) for truth in truths])
    return [
        *column_values(NAME, rows, ("equal",), unit=UNIT),
        MetricValues(NAME, units, chance, role="chance", unit=UNIT),
    ]
