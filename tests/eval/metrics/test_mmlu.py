import math

import pytest

from vila_ops.eval.metrics.columns import Columns
from vila_ops.eval.metrics.mmlu import mmlu, score


def test_the_likeliest_letter_is_the_answer() -> None:
    assert score([-3, -1, -2, -math.inf], 1, item="q") == Columns(1, 1)
    assert score([-3, -1, -2, -math.inf], 2, item="q") == Columns(0, 0)


def test_the_first_of_equals_wins_in_the_official_column_alone() -> None:
    assert score([-1, -1, -1, -1], 0, item="q") == Columns(official=1, corrected=0.25)
    assert score([-1, -1, -1, -1], 3, item="q") == Columns(official=0, corrected=0.25)


def test_micro_and_macro_are_apart() -> None:
    right, wrong = Columns(1, 1), Columns(0, 0)
    result = mmlu([("law", right), ("law", right), ("law", wrong), ("math", wrong)])
    assert result.micro == Columns(0.5, 0.5)
    assert result.macro == Columns(pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert result.subjects["math"] == wrong


def test_a_nan_and_an_unknown_option_are_named() -> None:
    with pytest.raises(ValueError, match="item 'q' has a likelihood that is NaN"):
        score([-1, math.nan], 0, item="q")
    with pytest.raises(ValueError, match="item 'q': the right option is number 4 of 4"):
        score([-1, -1, -1, -1], 4, item="q")


def test_no_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="no scores"):
        mmlu([])
