"""POPE: "Is there a X in the image?", read and scored as the official script does it. Pure.

Li et al., "Evaluating Object Hallucination in Large Vision-Language Models" (arXiv:2305.10355); rules of its
`evaluate.py`, which LLaVA's `eval_pope.py` repeats, except that answers are matched by id and not by their order.

N items; the four counts stand in the order true positive, false positive, true negative, false negative, yes being
positive. Statistics take sums of counts (..., 4) and return (...), so that `cluster_bootstrap` can call them.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

YesNo = Literal["yes", "no"]
FloatArray = NDArray[np.float64]

_NO = frozenset(("No", "not", "no"))
_COLUMN: dict[tuple[YesNo, YesNo], int] = {("yes", "yes"): 0, ("yes", "no"): 1, ("no", "no"): 2, ("no", "yes"): 3}
"""Of (given, true)."""


@dataclass(frozen=True)
class PopeCounts:
    """The official numbers, each from 0 to 1. A ratio of nothing by nothing is 0 (the script divides by zero)."""

    accuracy: float
    precision: float
    """0 where nothing was answered yes."""
    recall: float
    """0 where nothing is yes."""
    f1: float
    """0 where nothing is yes and nothing was answered so."""
    yes_ratio: float
    """Share answered yes; half of the labels are yes."""
    items: int


def parse_answer(text: str) -> YesNo:
    """yes or no of a free answer. No is a word "No", "not" or "no" before the first dot, commas taken out; else yes.

    As in the script words are split at single spaces and keep their case and marks: "NO", "No!", "no\\n" and an empty
    answer are yes.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "yes" if _NO.isdisjoint(words) else "no"


def count(answers: Sequence[tuple[str, str]], labels: Sequence[tuple[str, YesNo]]) -> FloatArray:
    """(N, 4): a one in the column of the item's outcome, in the order of `labels`.

    Both sides are pairs of an id and a text; the answers may stand in any order. ValueError names ids that occur twice
    or on one side alone, and a label that is neither yes nor no.
    """
    for side, ids in (("answers", [id_ for id_, _ in answers]), ("labels", [id_ for id_, _ in labels])):
        if doubled := [id_ for id_, times in Counter(ids).items() if times > 1]:
            raise ValueError(f"{side} hold {len(doubled)} ids more than once: {', '.join(doubled[:5])}")
    given = dict(answers)
    if alone := sorted(given.keys() ^ {id_ for id_, _ in labels}):
        raise ValueError(f"answers and labels differ in {len(alone)} ids: {', '.join(alone[:5])}")
    if wrong := [id_ for id_, label in labels if label not in ("yes", "no")]:
        raise ValueError(f"{len(wrong)} labels are neither 'yes' nor 'no': {', '.join(wrong[:5])}")
    counts = np.zeros((len(labels), 4))
    for row, (id_, label) in zip(counts, labels, strict=True):
        row[_COLUMN[parse_answer(given[id_]), label]] = 1
    return counts


def pope(counts: FloatArray) -> PopeCounts:
    """All numbers of the items of `count`, (N, 4). ValueError without items."""
    if not len(counts):
        raise ValueError("POPE of no items; give at least one")
    sums = counts.sum(axis=0)
    return PopeCounts(
        accuracy=float(accuracy(sums)),
        precision=float(precision(sums)),
        recall=float(recall(sums)),
        f1=float(f1(sums)),
        yes_ratio=float(yes_ratio(sums)),
        items=len(counts),
    )


def accuracy(sums: FloatArray) -> FloatArray:
    """(TP + TN) / items. (..., 4) -> (...)."""
    return _ratio(sums[..., 0] + sums[..., 2], sums.sum(axis=-1))


def precision(sums: FloatArray) -> FloatArray:
    """TP / (TP + FP), 0 where nothing was answered yes. (..., 4) -> (...)."""
    return _ratio(sums[..., 0], sums[..., 0] + sums[..., 1])


def recall(sums: FloatArray) -> FloatArray:
    """TP / (TP + FN), 0 where nothing is yes. (..., 4) -> (...)."""
    return _ratio(sums[..., 0], sums[..., 0] + sums[..., 3])


def f1(sums: FloatArray) -> FloatArray:
    """2 TP / (2 TP + FP + FN), the harmonic mean of precision and recall, 0 of nothing. (..., 4) -> (...)."""
    return _ratio(2 * sums[..., 0], 2 * sums[..., 0] + sums[..., 1] + sums[..., 3])


def yes_ratio(sums: FloatArray) -> FloatArray:
    """(TP + FP) / items. (..., 4) -> (...)."""
    return _ratio(sums[..., 0] + sums[..., 1], sums.sum(axis=-1))


def _ratio(numerator: FloatArray, denominator: FloatArray) -> FloatArray:
    """0 where the denominator is 0; every numerator here is then 0 too."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator != 0)
