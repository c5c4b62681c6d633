"""Answers that equal the held-out ones; see `config.eval.AnswerMatch`."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vila_ops.config.eval import AnswerMatch
from vila_ops.eval.benchmark import Aggregate, EvalInputs, GenerateRequest, Intervals, Scored, tables
from vila_ops.eval.benchmarks.held_out.items import SampleItem, sample_items
from vila_ops.eval.benchmarks.held_out.prompts import check_tokenizer, prompt_of, shown_by_condition
from vila_ops.eval.metrics.answers import normalised
from vila_ops.eval.report import ItemAnswer, ItemScore, MetricRole

if TYPE_CHECKING:
    from vila_ops.data.text.conversation import Tokenizer

REVISION = 2
NAME, UNIT = "answer_match", "share equal"


@dataclass(frozen=True)
class QuestionItem:
    """A held-out conversation and its first answer."""

    sample: SampleItem
    truth: str


def items(inputs: EvalInputs, config: AnswerMatch, tokenizer: "Tokenizer") -> tuple[QuestionItem, ...]:
    """The held-out conversations. Raises ValueError where they are of another tokenizer."""
    samples = sample_items(inputs, inputs.conversations, with_images=config.control == "shuffled")
    check_tokenizer(samples, tokenizer)
    answers = [tokenizer.decode(one.input_ids[slice(*one.spans[0])]).strip() for one in samples]
    return tuple(QuestionItem(sample, truth) for sample, truth in zip(samples, answers, strict=True))


def requests(
    items: Sequence[QuestionItem], config: AnswerMatch, tokenizer: "Tokenizer"
) -> dict[str, list[GenerateRequest]]:
    """The answer to each first question, with the matched and with the shuffled image."""
    samples = [item.sample for item in items]
    return {
        condition: [
            GenerateRequest(prompt_of(sample, sample.spans[0][0], images, tokenizer), config.max_new_tokens)
            for sample, images in zip(samples, shown, strict=True)
        ]
        for condition, shown in shown_by_condition(samples, config.control).items()
    }


def score(items: Sequence[QuestionItem], config: AnswerMatch, responses: Mapping[str, Sequence[str]]) -> Scored:
    """1 where an answer equals the held-out one; the chance level answers what is most frequent among these."""
    truths = [normalised(item.truth) for item in items]
    counts = Counter(truths)
    frequent = min(counts, key=lambda text: (-counts[text], text))
    given: dict[MetricRole, list[str]] = {"model": [text.strip() for text in responses["matched"]]}
    if config.control == "shuffled":
        given["control"] = [text.strip() for text in responses["shuffled"]]
    equal = {
        role: [normalised(text) == truth for text, truth in zip(texts, truths, strict=True)]
        for role, texts in given.items()
    }
    equal["chance"] = [frequent == truth for truth in truths]
    return Scored(
        items=tuple(
            ItemScore(
                item=item.sample.key,
                cluster=item.sample.object,
                scores={role: {"equal": float(values[number])} for role, values in equal.items()},
            )
            for number, item in enumerate(items)
        ),
        answers=tuple(
            ItemAnswer(
                key=item.sample.key,
                object=item.sample.object,
                truth=item.truth,
                answer=given["model"][number],
                control=given["control"][number] if "control" in given else None,
            )
            for number, item in enumerate(items)
        ),
    )


def aggregate(scores: Sequence[ItemScore], config: AnswerMatch, intervals: Intervals) -> Aggregate:
    """The share of equal answers of the model, of the chance level and with shuffled images, and the gap to these."""
    return Aggregate(intervals.metrics(NAME, tables(scores), statistic="mean", unit=UNIT))
