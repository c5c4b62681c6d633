import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vila_ops.eval.metrics.choice import share_right


@pytest.mark.parametrize(
    ("scores", "share"),
    [
        ([-1.5, -3.0, -2.0], 1.0),
        ([-3.0, -1.5, -2.0], 0.0),
        ([-1.0, -2.0, -1.0, -1.0], 1 / 3),
        ([0.0] * 4, 0.25),
        ([-math.inf, -900.0], 0.0),
    ],
)
def test_the_true_option_has_to_win_and_shares_a_tie(scores: list[float], share: float) -> None:
    assert share_right(scores, item="1") == share


@given(st.lists(st.floats(allow_nan=False), min_size=1))
def test_it_is_the_mean_of_a_guess_among_the_best(scores: list[float]) -> None:
    best = np.flatnonzero(np.array(scores) == np.max(scores))
    assert share_right(scores, item="1") == pytest.approx(np.mean(best == 0))


@pytest.mark.parametrize("scores", [[math.nan, 1.0], [1.0, math.nan]])
def test_nan_is_refused_by_the_name_of_its_item(scores: list[float]) -> None:
    with pytest.raises(ValueError, match=r"item 'fox-3'.*NaN"):
        share_right(scores, item="fox-3")


def test_no_options_are_refused() -> None:
    with pytest.raises(ValueError, match="item '1' has no options"):
        share_right([], item="1")
