"""Multiple choice by score: which option is taken, and how often it is the right one. Pure."""

import math
from collections.abc import Mapping, Sequence


def pick(scores: Sequence[float], *, item: str) -> int:
    """Index of the highest score; of equal ones the first. -inf (an impossible option) is a score like any other.

    ValueError names the item whose scores are empty or hold a NaN, which would win or lose by its place alone.
    """
    if not scores:
        raise ValueError(f"item {item!r} has no options; give at least one score")
    if unknown := [index for index, score in enumerate(scores) if math.isnan(score)]:
        raise ValueError(f"item {item!r}: the score of option {unknown[0]} is NaN; look for an overflow in the model")
    return max(range(len(scores)), key=scores.__getitem__)


def correct(scores: Mapping[str, Sequence[float]], answers: Mapping[str, int]) -> dict[str, bool]:
    """Whether the picked option is the answer, by item, in the order of `answers` (indices from 0).

    ValueError names items that one side lacks, an answer that is not an option, and what `pick` refuses.
    """
    if scores.keys() != answers.keys():
        alone = sorted(scores.keys() ^ answers.keys())
        raise ValueError(f"scores and answers differ in {len(alone)} items: {', '.join(alone[:5])}")
    for item, answer in answers.items():
        if not 0 <= answer < len(scores[item]):
            raise ValueError(f"item {item!r}: answer {answer} is none of {len(scores[item])} options, counted from 0")
    return {item: pick(scores[item], item=item) == answer for item, answer in answers.items()}


def accuracy(hits: Mapping[str, bool]) -> float:
    """Correct items / items, 0 to 1. ValueError without items: there is no accuracy to report."""
    if not hits:
        raise ValueError("accuracy of no items; give at least one")
    return sum(hits.values()) / len(hits)
