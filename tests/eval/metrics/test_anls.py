import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.eval.metrics.official import recorded
from vila_ops.eval.metrics.anls import levenshtein, score
from vila_ops.eval.metrics.columns import Columns


def test_the_official_column_is_the_official_code() -> None:
    for item in recorded("anls")["items"]:
        assert score(item["answer"], item["references"]).official == item["official"], item


@pytest.mark.parametrize(
    ("left", "right", "distance"),
    [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("ab", "ba", 2)],
)
def test_distances_by_hand(left: str, right: str, distance: int) -> None:
    assert levenshtein(left, right) == levenshtein(right, left) == distance


@given(st.text("ab", max_size=8), st.text("ab", max_size=8), st.text("ab", max_size=8))
def test_the_distance_is_a_metric(first: str, second: str, third: str) -> None:
    assert (levenshtein(first, second) == 0) == (first == second)
    assert levenshtein(first, third) <= levenshtein(first, second) + levenshtein(second, third)


def test_the_nearest_reference_counts() -> None:
    assert score("Coca Colla", ["pepsi", "coca  cola"]) == Columns(pytest.approx(0.9), pytest.approx(0.9))


def test_half_a_distance_counts_in_the_script_alone() -> None:
    assert score("ab", ["ax"]) == Columns(official=0.5, corrected=0)


def test_spaces_around_an_answer_raise_the_score_in_the_script_alone() -> None:
    assert score("abc" + " " * 7, ["abd"]) == Columns(pytest.approx(0.9), pytest.approx(2 / 3))


def test_a_longer_upper_case_raises_the_score_in_the_script_alone() -> None:
    result = score("ßx", ["ßy"])
    assert (result.official, result.corrected) == (pytest.approx(2 / 3), 0)


def test_empty_texts_are_equal() -> None:
    assert score("", [""]) == Columns(1, 1)


def test_an_answer_of_100_000_characters_scores_nothing() -> None:
    assert score("x" * 100_000, ["yes", "no"]) == Columns(0, 0)


def test_a_question_without_references_is_refused() -> None:
    with pytest.raises(ValueError, match="without references"):
        score("a", [])
