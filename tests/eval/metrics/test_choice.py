import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vila_ops.eval.metrics.choice import accuracy, correct, pick


def test_the_highest_score_is_picked() -> None:
    assert pick([-3.0, -1.5, -2.0], item="1") == 1


def test_of_equal_scores_the_first_is_picked() -> None:
    assert pick([-2.0, -1.0, -1.0], item="1") == 1


def test_an_impossible_option_loses() -> None:
    assert pick([-math.inf, -900.0], item="1") == 1


@given(st.lists(st.floats(allow_nan=False), min_size=1))
def test_picks_are_those_of_argmax(scores: list[float]) -> None:
    assert pick(scores, item="1") == int(np.argmax(scores))


@pytest.mark.parametrize("scores", [[math.nan, 1.0], [1.0, math.nan]])
def test_nan_is_refused_by_the_name_of_its_item(scores: list[float]) -> None:
    with pytest.raises(ValueError, match=r"item 'fox-3'.*NaN"):
        pick(scores, item="fox-3")


def test_no_options_are_refused() -> None:
    with pytest.raises(ValueError, match="item '1' has no options"):
        pick([], item="1")


def test_items_are_matched_by_name_and_keep_the_order_of_the_answers() -> None:
    hits = correct({"a": [0.0, 1.0], "b": [1.0, 0.0], "c": [0.0, 1.0]}, {"c": 0, "a": 1, "b": 0})
    assert list(hits.items()) == [("c", False), ("a", True), ("b", True)]
    assert accuracy(hits) == 2 / 3


def test_items_of_one_side_alone_are_named() -> None:
    with pytest.raises(ValueError, match="differ in 2 items: b, c"):
        correct({"a": [1.0], "b": [1.0]}, {"a": 0, "c": 0})


@pytest.mark.parametrize("answer", [-1, 2])
def test_an_answer_that_is_no_option_is_refused(answer: int) -> None:
    with pytest.raises(ValueError, match=f"item 'a': answer {answer} is none of 2 options"):
        correct({"a": [1.0, 0.0]}, {"a": answer})


def test_accuracy_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no items"):
        accuracy({})
