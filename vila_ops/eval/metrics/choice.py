"""Multiple choice by scores: the share of a right answer. Pure."""

import math
from collections.abc import Sequence


def share_right(scores: Sequence[float], *, item: str) -> float:
    """1.0 where the first option, the true one, has the highest score alone, 1/k where k options share it, else 0.0.

    A tie is a guess among equals, so that a model with equal scores is at the chance level whatever the order of the
    options. -inf (an impossible option) is a score like any other. Raises ValueError, with the item's name, for no
    scores or a NaN.
    """
    if not scores:
        raise ValueError(f"item {item!r} has no options; give at least one score")
    if unknown := [index for index, score in enumerate(scores) if math.isnan(score)]:
        raise ValueError(f"item {item!r}: the score of option {unknown[0]} is NaN; look for an overflow in the model")
    best = max(scores)
    return 1.0 / list(scores).count(best) if scores[0] == best else 0.0
