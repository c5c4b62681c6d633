"""POPE's questions on held-out images: is an object in the image; see `config.eval.HeldOutPope`."""

from collections.abc import Mapping, Sequence

import numpy as np

from vila_ops.config.eval import HeldOutPope
from vila_ops.data.records import Image
from vila_ops.data.text.questions import YES_NO
from vila_ops.eval.benchmark import LazyTokenizer, MetricValues, ScoreRequest, TextPrompt, Units
from vila_ops.eval.benchmarks.held_out.items import HeldOut, ImageItem, image_items
from vila_ops.eval.benchmarks.held_out.prompts import of_condition, shown_images
from vila_ops.eval.metrics import pope
from vila_ops.eval.rows import ItemRow
from vila_ops.eval.statistics import FloatArray

REVISION = 5
NAME = "held_out_pope"
YES, NO = "Yes.", "No."
COLUMNS = ("true_positive", "false_positive", "true_negative", "false_negative")
STATISTICS = {"accuracy": pope.accuracy, "f1": pope.f1, "yes_ratio": pope.yes_ratio}


def read(source: HeldOut, config: HeldOutPope) -> tuple[ImageItem, ...]:
    """The held-out images, each with one question."""
    return image_items(source.inputs, config.objects)


def requests(items: Sequence[ImageItem], config: HeldOutPope, tokenizer: LazyTokenizer) -> list[ScoreRequest]:
    """The likelihoods of yes and no after each question, through the chat template."""
    answers = (tokenizer().answer_ids(YES), tokenizer().answer_ids(NO))
    return [
        ScoreRequest(
            item=item.id,
            condition=condition,
            prompt=TextPrompt((("user", (Image(image), YES_NO.format(name=_asked_name(number, item)))),)),
            continuations=answers,
            labels=(YES, NO),
        )
        for condition, images in shown_images(items, config.control).items()
        for number, (item, image) in enumerate(zip(items, images, strict=True))
    ]


def score(items: Sequence[ImageItem], rows: Sequence[ItemRow], config: HeldOutPope) -> list[Mapping[str, float]]:
    """The outcome of each question as one of four counts; the likelier of the two answers is the model's."""
    labels = _labels(items)
    counts = [_counts([(row.item, row.answer or "")], labels)[0] for row in rows]
    return [dict(zip(COLUMNS, outcome.tolist(), strict=True)) for outcome in counts]


def metrics(items: Sequence[ImageItem], rows: Sequence[ItemRow], config: HeldOutPope) -> list[MetricValues]:
    """Accuracy, F1 and share of yes for the model, for the shuffled images, and for always yes."""
    by_role = of_condition(rows)
    tables = {role: np.array([[row.scores[one] for one in COLUMNS] for row in own]) for role, own in by_role.items()}
    own = by_role["model"]
    always = _counts([(row.item, YES) for row in own], _labels(items))
    return [
        MetricValues(f"{NAME}_{name}", Units.of(by_role.get(role, own)), counts, statistic, role=role, gap=False)
        for name, statistic in STATISTICS.items()
        for role, counts in {**tables, "chance": always}.items()
    ]


def _labels(items: Sequence[ImageItem]) -> dict[str, pope.YesNo]:
    return {item.id: "yes" if _is_present(number) else "no" for number, item in enumerate(items)}


def _counts(answers: Sequence[tuple[str, str]], labels: Mapping[str, pope.YesNo]) -> FloatArray:
    return pope.count(answers, [(id_, labels[id_]) for id_, _ in answers])


def _is_present(number: int) -> bool:
    """Whether a question asks for the item's own object: every second one does, from the first."""
    return number % 2 == 0


def _asked_name(number: int, item: ImageItem) -> str:
    name = item.group if _is_present(number) else item.absent
    if name is None:
        raise ValueError(f"item {item.id!r}: no held-out object is in neither image; enlarge the split")
    return name
