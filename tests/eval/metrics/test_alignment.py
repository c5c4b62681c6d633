import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_similarity

from vila_ops.eval.metrics.alignment import chamfer_similarity


def test_by_hand() -> None:
    visual = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]])
    textual = np.array([[5.0, 0.0]])
    # cosines to (1, 0): 1, 0 and 3/5. The visual tokens' mean of the highest is 1.6 / 3, the textual token's 1.
    assert chamfer_similarity(visual, textual) == pytest.approx((1.6 / 3 + 1) / 2)


def test_equal_sets_are_one_and_opposite_ones_minus_one() -> None:
    states = np.random.default_rng(0).normal(size=(7, 5))
    assert chamfer_similarity(states, 3 * states[::-1]) == pytest.approx(1)
    assert chamfer_similarity(states[:1], -states[:1]) == pytest.approx(-1)


def test_against_cosines_of_scikit_learn_and_the_same_from_both_sides() -> None:
    drawn = np.random.default_rng(1)
    visual, textual = drawn.normal(size=(64, 48)), drawn.normal(size=(9, 48))
    cosines = cosine_similarity(visual, textual)
    nearest = [cosines.max(axis=axis).mean() for axis in (0, 1)]
    assert chamfer_similarity(visual, textual) == pytest.approx(sum(nearest) / 2)
    assert chamfer_similarity(visual, textual) == pytest.approx(chamfer_similarity(textual, visual))


@pytest.mark.parametrize("bad", [np.zeros((2, 3)), np.full((2, 3), np.inf), np.full((2, 3), np.nan)])
def test_what_has_no_direction_is_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="no direction"):
        chamfer_similarity(bad, np.ones((1, 3)))


def test_an_empty_side_is_refused() -> None:
    with pytest.raises(ValueError, match="0 visual and 1 textual"):
        chamfer_similarity(np.zeros((0, 3)), np.ones((1, 3)))
