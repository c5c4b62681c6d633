"""Answers and scores of POPE ("Is there a X in the image?") by the rules of the official script. Pure.

Li et al., "Evaluating Object Hallucination in Large Vision-Language Models" (arXiv:2305.10355). The rules are those of
its `evaluate.py`, which LLaVA's `eval_pope.py` repeats for each file of questions. The script is the same in both
versions of the benchmark; the questions are not: see `QUESTIONS`. A number names its version.

The columns differ in three cases.

- The script pairs answers and labels by their order and drops what the longer list has more: `official_in_order`.
  Here they are matched by id (`count`), and another number of them is an error.
- The script reads every answer that lacks the words "No", "not" and "no" as yes: "NO", "No!", "no" before a line end,
  "isn't", an empty answer; and "I am not sure" as no (POPE#19). Corrected: `corrected_answer`, where an empty answer
  and one that does not decide are neither and count as wrong.
- The script fails where no answer or no label is yes; a ratio 0 / 0 is 0 here.

N items. The four counts are true positives, false positives, true negatives and false negatives, in this order, where
yes is positive. Statistics take sums of counts (..., 4) and return (...), as `cluster_bootstrap` calls them.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vila_ops.eval.metrics.answers import half_width

YesNo = Literal["yes", "no"]
FloatArray = NDArray[np.float64]

QUESTIONS = {
    "e3e3926": {"random": 2910, "popular": 3000, "adversarial": 3000},
    "109985c": {"random": 3000, "popular": 3000, "adversarial": 3000},
}
"""Questions on COCO in each file, by the last commit that changed them. LLaVA and VILA report the former version."""

_NO = frozenset(("No", "not", "no"))
_NEGATION = re.compile(r"\b(?:no|nope|not|none|neither|cannot)\b|n['’]t\b", re.IGNORECASE)
_DECIDED = re.compile(r"\W*(?:yes|no)\b", re.IGNORECASE)
_UNDECIDED = re.compile(
    r"\b(?:not (?:sure|certain)|unsure|uncertain|unclear|maybe|perhaps|"
    r"(?:cannot|can['’]t|(?:unable|impossible|not possible|hard|difficult) to) (?:tell|say|determine|know|answer))\b",
    re.IGNORECASE,
)
_COLUMN: dict[tuple[YesNo, YesNo], int] = {("yes", "yes"): 0, ("yes", "no"): 1, ("no", "no"): 2, ("no", "yes"): 3}
"""The column of (given answer, true answer)."""
_OPPOSITE: dict[YesNo, YesNo] = {"yes": "no", "no": "yes"}


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


def corrected_answer(text: str) -> YesNo | None:
    """Read a free answer as yes or no by its first sentence that has a word: no where it has a negation, else yes.

    None, which is neither, where there is no word, and where the sentence says that it is not known and does not begin
    with yes or no. Case, line ends and marks do not matter.
    """
    for sentence in re.split(r"[.\n]", half_width(text)):
        if re.search(r"\w", sentence):
            if _UNDECIDED.search(sentence) and not _DECIDED.match(sentence):
                return None
            return "no" if _NEGATION.search(sentence) else "yes"
    return None


def count(
    answers: Sequence[tuple[str, str]],
    labels: Sequence[tuple[str, YesNo]],
    *,
    parse: Callable[[str], YesNo | None] = parse_answer,
) -> FloatArray:
    """The outcome of each item, (N, 4), with a one in the outcome's column, in the order of `labels`.

    Both arguments are pairs of an id and a text; the answers may be in any order. `parse` is `parse_answer` for the
    official column and `corrected_answer` for the corrected one; what it reads as neither counts as the wrong answer.
    Raises ValueError for ids that occur twice or in one of the two alone, and for a label that is neither yes nor no.
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
        row[_COLUMN[parse(given[id_]) or _OPPOSITE[label], label]] = 1
    return counts


def official_in_order(answers: Sequence[str], labels: Sequence[str]) -> PopeCounts:
    """All numbers as the script computes them: by order, for the shorter of both, where a label other than no is yes.

    The share of yes is that of all answers. Raises ValueError without a pair.
    """
    said = [parse_answer(answer) for answer in answers]
    true: list[YesNo] = ["no" if label == "no" else "yes" for label in labels]
    counts = np.zeros((min(len(said), len(true)), 4))
    for row, given, label in zip(counts, said, true, strict=False):
        row[_COLUMN[given, label]] = 1
    return replace(pope(counts), yes_ratio=said.count("yes") / len(said))


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
