import pytest

from vila_ops.eval.metrics.columns import Columns, mean, right


def test_the_mean_is_that_of_each_column() -> None:
    assert mean([Columns(1, 0), Columns(0, 0), Columns(0.5, 1)]) == Columns(0.5, 1 / 3)


def test_right_is_one_and_wrong_is_zero() -> None:
    assert right(True, False) == Columns(official=1, corrected=0)


def test_the_mean_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no scores"):
        mean([])
