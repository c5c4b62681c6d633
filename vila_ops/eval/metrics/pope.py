"""Answers and scores of POPE ("Is there a X in the image?") by the rules of the official script. Pure.

Li et al., "Evaluating Object Hallucination in Large Vision-Language Models" (arXiv:2305.10355). The rules are those of
its `evaluate.py`, which LLaVA's `eval_pope.py` repeats, but answers are matched by id and not by their order.

N items. The four counts are true positives, false positives, true negatives and false negatives, in this order, where
yes is positive. Statistics take sums of counts (..., 4) and return (...), as `cluster_bootstrap` calls them.
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
"""The column of (given answer, true answer)."""


@dataclass(frozen=True)
class PopeCounts:
    """The official numbers, each from 0 to 1. A ratio 0 / 0 is 0, where the script fails (division by zero)."""

    accuracy: float
    precision: float
    """0 where no answer is yes."""
    recall: float
    """0 where no label is yes."""
    f1: float
    """0 where no label and no answer is yes."""
    yes_ratio: float
    """Share of answers that are yes; half of the labels are yes."""
    items: int


def parse_answer(text: str) -> YesNo:
    """Read a free answer as yes or no: no where a word before the first dot, without commas, is "No", "not" or "no".

    As in the script, words are split at single spaces and keep their case and punctuation: "NO", "No!", "no\\n" and an
    empty answer are yes.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "yes" if _NO.isdisjoint(words) else "no"


def count(answers: Sequence[tuple[str, str]], labels: Sequence[tuple[str, YesNo]]) -> FloatArray:
    """The outcome of each item, (N, 4), with a one in the outcome's column, in the order of `labels`.

    Both arguments are pairs of an id and a text; the answers may be in any order. Raises ValueError for ids that occur
    twice or in one of the two alone, and for a label that is neither yes nor no.
    """
    for side, ids in (("answers", [id_ for id_, _ in answers]), ("labels", [id_ for id_, _ in labels])):
        if doubled := [id_ for id_, times in Counter(ids).items() if times > 1]:
            raise ValueError(f"{side} have {len(doubled)} ids more than once: {', '.join(doubled[:5])}")
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
    """All numbers of the items of `count`, (N, 4). Raises ValueError without items."""
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
    """TP / (TP + FP), 0 where no answer is yes. (..., 4) -> (...)."""
    return _ratio(sums[..., 0], sums[..., 0] + sums[..., 1])


def recall(sums: FloatArray) -> FloatArray:
    """TP / (TP + FN), 0 where no label is yes. (..., 4) -> (...)."""
    return _ratio(sums[..., 0], sums[..., 0] + sums[..., 3])


def f1(sums: FloatArray) -> FloatArray:
    """2 TP / (2 TP + FP + FN), the harmonic mean of precision and recall, or 0. (..., 4) -> (...)."""
    return _ratio(2 * sums[..., 0], 2 * sums[..., 0] + sums[..., 1] + sums[..., 3])


def yes_ratio(sums: FloatArray) -> FloatArray:
    """(TP + FP) / items. (..., 4) -> (...)."""
    return _ratio(sums[..., 0] + sums[..., 1], sums.sum(axis=-1))


def _ratio(numerator: FloatArray, denominator: FloatArray) -> FloatArray:
    """The ratio, or 0 where the denominator is 0, and with it every numerator of these statistics."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator != 0)
