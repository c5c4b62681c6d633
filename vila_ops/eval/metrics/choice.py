"""Multiple choice by score: how far an item was answered right. Pure."""

import math
from collections.abc import Sequence


def share_right(scores: Sequence[float], *, item: str) -> float:
    """1.0 where the first option, the true one, has the highest score alone, 1/k where k options share it, else 0.0.

    A guess among equals: a model that cannot tell the options apart is at chance, wherever the true one stands. -inf
    (an impossible option) is a score like any other. ValueError names the item whose scores are empty or hold a NaN.
    """
    if not scores:
        raise ValueError(f"item {item!r} has no options; give at least one score")
    if unknown := [index for index, score in enumerate(scores) if math.isnan(score)]:
        raise ValueError(f"item {item!r}: the score of option {unknown[0]} is NaN; look for an overflow in the model")
    best = max(scores)
    return 1.0 / list(scores).count(best) if scores[0] == best else 0.0
