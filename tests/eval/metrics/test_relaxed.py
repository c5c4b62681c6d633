import pytest

from tests.eval.metrics.official import recorded
from vila_ops.eval.metrics.columns import Columns
from vila_ops.eval.metrics.relaxed import score


def test_the_official_column_is_the_official_code() -> None:
    for item in recorded("relaxed")["items"]:
        assert bool(score(item["answer"], item["truth"]).official) == item["official"], item


@pytest.mark.parametrize(
    ("answer", "truth"),
    [("100%", "96%"), ("100%", "0.96"), ("105", "100"), ("95", "100"), ("-21", "-20"), ("Yes", "yes"), ("abc", "Abc")],
)
def test_right_in_both_columns(answer: str, truth: str) -> None:
    assert score(answer, truth) == Columns(1, 1)


@pytest.mark.parametrize(
    ("answer", "truth"),
    [("100%", "94%"), ("100%", "0.94"), ("106", "100"), ("-20", "20"), ("Don't", "Won't"), ("", "5"), ("five", "5")],
)
def test_wrong_in_both_columns(answer: str, truth: str) -> None:
    assert score(answer, truth) == Columns(0, 0)


@pytest.mark.parametrize(
    ("answer", "truth", "columns"),
    [
        ("0.0", "0", Columns(0, 1)),
        ("0", "0.0", Columns(0, 1)),
        ("0.01", "0", Columns(0, 0)),
        ("5%", "5", Columns(0, 1)),
        ("5", "5%", Columns(0, 1)),
        ("1,000", "1000", Columns(0, 1)),
        ("$5", "5", Columns(0, 1)),
        ("2008", "2010", Columns(1, 0)),
        ("2010.0", "2010", Columns(1, 1)),
        ("2008.5", "2010.5", Columns(1, 1)),
        ("2,008", "2,010", Columns(0, 1)),
        (" Blue\n", "blue", Columns(0, 1)),
        ("Yes.", "Yes", Columns(0, 1)),  # VLMEvalKit#948
        ("5%.", "5%", Columns(0, 1)),
        ("２０％", "20%", Columns(0, 1)),  # full width
        ("nan", "NaN", Columns(0, 1)),
        ("1_000", "1000", Columns(1, 0)),
    ],
)
def test_differences_of_the_columns(answer: str, truth: str, columns: Columns) -> None:
    assert score(answer, truth) == columns


def test_the_answer_is_compared_with_the_truth_and_not_the_other_way_round() -> None:
    assert score("95.1", "100").official == 1
    assert score("100", "95.1").official == 0
