"""Scores of MME as by its official `calculation.py`. Pure.

Fu et al., "MME" (arXiv:2306.13394). Each image has two questions, one to be answered yes and one no. A subtask scores
100 times the accuracy plus 100 times the accuracy plus (the share of images with both right); the perception score is
the sum of ten subtasks (at most 2000), the cognition score that of four (at most 800).

The columns differ in two cases.

- The script reads an answer that is not exactly yes or no by its first four characters: "Now it does" and "know" are
  no, "Eyes" is yes, "It is: no" and "**No**," beyond the fourth character are neither. Corrected: the first word that
  is yes or no, full-width letters too.
- The script pairs lines by their order. Here the questions of an image are paired by its name in both columns; for the
  official files, where they are neighbours, that is the same.

An answer that is neither is wrong in both columns. The script fails for a subtask where all answers are neither.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vila_ops.eval.metrics.answers import half_width
from vila_ops.eval.metrics.columns import Columns, mean, right

PERCEPTION = (
    *("existence", "count", "position", "color", "posters"),
    *("celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
QUESTIONS_OF_AN_IMAGE = 2

Said = Literal["yes", "no", "other"]

_YES_OR_NO = re.compile(r"\b(yes|no)\b")


@dataclass(frozen=True)
class MmeItem:
    """A question of MME with the answer of a model."""

    subtask: str
    image: str
    truth: Literal["yes", "no"]
    answer: str


@dataclass(frozen=True)
class SubtaskScore:
    """The scores of a subtask."""

    accuracy: Columns
    """From 0 to 1."""
    accuracy_plus: Columns
    """Share of the images with both answers right."""
    score: Columns
    """100 times the sum of both, from 0 to 200."""


@dataclass(frozen=True)
class MmeScores:
    """The scores of the whole benchmark."""

    subtasks: dict[str, SubtaskScore]
    perception: Columns | None
    """The sum of the ten subtasks; None where one of them has no items."""
    cognition: Columns | None


def official_answer(text: str) -> Said:
    """Read an answer as the script does."""
    text = text.lower()
    start = text if text in ("yes", "no") else text[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def corrected_answer(text: str) -> Said:
    """The first word of an answer that is yes or no."""
    match = _YES_OR_NO.search(half_width(text).lower())
    return "other" if match is None else "yes" if match[1] == "yes" else "no"


def score(item: MmeItem) -> Columns:
    """1 where the answer is right, else 0."""
    return right(official_answer(item.answer) == item.truth, corrected_answer(item.answer) == item.truth)


def mme(items: Sequence[MmeItem]) -> MmeScores:
    """The scores of all subtasks. Raises ValueError for no items, or for an image without exactly two questions."""
    if not items:
        raise ValueError("MME of no items; give at least one image with its two questions")
    of_image = Counter((item.subtask, item.image) for item in items)
    if odd := [name for name, number in of_image.items() if number != QUESTIONS_OF_AN_IMAGE]:
        raise ValueError(
            f"{len(odd)} images have not two answered questions, such as {odd[0][1]!r} of {odd[0][0]!r} with "
            f"{of_image[odd[0]]}; answer both or leave the image out"
        )
    by_subtask: dict[str, list[MmeItem]] = defaultdict(list)
    for item in items:
        by_subtask[item.subtask].append(item)
    subtasks = {name: _subtask(members) for name, members in by_subtask.items()}
    return MmeScores(subtasks, perception=_total(subtasks, PERCEPTION), cognition=_total(subtasks, COGNITION))


def _subtask(items: Sequence[MmeItem]) -> SubtaskScore:
    scores: dict[str, list[Columns]] = defaultdict(list)
    for item in items:
        scores[item.image].append(score(item))
    accuracy = mean(one for pair in scores.values() for one in pair)
    plus = mean(
        right(all(one.official for one in pair), all(one.corrected for one in pair)) for pair in scores.values()
    )
    return SubtaskScore(
        accuracy,
        plus,
        Columns(
            official=100 * accuracy.official + 100 * plus.official,
            corrected=100 * accuracy.corrected + 100 * plus.corrected,
        ),
    )


def _total(subtasks: dict[str, SubtaskScore], names: Sequence[str]) -> Columns | None:
    if not subtasks.keys() >= set(names):
        return None
    return Columns(
        official=sum(subtasks[name].score.official for name in names),
        corrected=sum(subtasks[name].score.corrected for name in names),
    )
