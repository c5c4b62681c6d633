"""POPE questions on held-out images: is an object in the image; see `config.eval.PopeBenchmark`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vila_ops.config.eval import PopeBenchmark
from vila_ops.data.records import Image
from vila_ops.data.text.questions import YES_NO
from vila_ops.eval.benchmark import Aggregate, EvalInputs, Intervals, Scored, ScoreRequest, tables
from vila_ops.eval.benchmarks.held_out.items import ImageItem, image_items
from vila_ops.eval.benchmarks.held_out.prompts import shown_images
from vila_ops.eval.metrics import pope
from vila_ops.eval.report import ItemScore, MetricRole
from vila_ops.generate.request import Loglikelihood, Prompt

if TYPE_CHECKING:
    from vila_ops.data.text.conversation import Tokenizer

REVISION = 3
UNIT = "share"
YES, NO = "Yes.", "No."
COLUMNS = ("true_positive", "false_positive", "true_negative", "false_negative")
STATISTICS = {"pope_accuracy": pope.accuracy, "pope_f1": pope.f1, "pope_yes_ratio": pope.yes_ratio}


def items(inputs: EvalInputs, config: PopeBenchmark, tokenizer: "Tokenizer") -> tuple[ImageItem, ...]:
    """The held-out images, each with one question."""
    return image_items(inputs)


def requests(
    items: Sequence[ImageItem], config: PopeBenchmark, tokenizer: "Tokenizer"
) -> dict[str, list[ScoreRequest]]:
    """The likelihoods of yes and no after each question, through the chat template."""
    answers = (tokenizer.answer_ids(YES), tokenizer.answer_ids(NO))
    by_condition = {}
    for condition, images in shown_images(items, config.control).items():
        turns = [
            (Image(image), YES_NO.format(name=_asked_name(number, item)))
            for number, (item, image) in enumerate(zip(items, images, strict=True))
        ]
        prompts = [Prompt(tokenizer.prompt([("user", parts)]), (parts[0].data,)) for parts in turns]
        by_condition[condition] = [ScoreRequest(prompt, answers) for prompt in prompts]
    return by_condition


def score(
    items: Sequence[ImageItem], config: PopeBenchmark, responses: Mapping[str, Sequence[list[Loglikelihood]]]
) -> Scored:
    """The outcome of each question as one of four counts; the likelier of the two answers is the model's."""
    labels: list[tuple[str, pope.YesNo]] = [
        (item.key, "yes" if _is_present(number) else "no") for number, item in enumerate(items)
    ]
    answers: dict[MetricRole, list[str]] = {
        "model": _likelier(responses["matched"]),
        "chance": [YES] * len(items),
    }
    if config.control == "shuffled":
        answers["control"] = _likelier(responses["shuffled"])
    keys = [item.key for item in items]
    by_role = {role: pope.count(list(zip(keys, texts, strict=True)), labels) for role, texts in answers.items()}
    return Scored(
        tuple(
            ItemScore(
                item=item.key,
                cluster=item.object,
                scores={
                    role: dict(zip(COLUMNS, counts[number].tolist(), strict=True)) for role, counts in by_role.items()
                },
            )
            for number, item in enumerate(items)
        )
    )


def aggregate(scores: Sequence[ItemScore], config: PopeBenchmark, intervals: Intervals) -> Aggregate:
    """Accuracy, F1 and share of yes for the model, for always yes, and for the shuffled images."""
    by_role = tables(scores)
    return Aggregate(
        tuple(
            intervals.metric(name, role, counts, statistic=statistic, unit=UNIT)
            for name, statistic in STATISTICS.items()
            for role, counts in by_role.items()
        )
    )


def _likelier(scores: Sequence[list[Loglikelihood]]) -> list[str]:
    return [YES if yes.nll <= no.nll else NO for yes, no in scores]


def _is_present(number: int) -> bool:
    """Whether a question asks for the item's own object: every second one does, from the first."""
    return number % 2 == 0


def _asked_name(number: int, item: ImageItem) -> str:
    name = item.object if _is_present(number) else item.absent
    if name is None:
        raise ValueError(f"item {item.key!r}: no held-out object is in neither image; enlarge the split")
    return name
