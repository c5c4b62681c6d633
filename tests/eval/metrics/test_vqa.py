from typing import Any

import pytest

from tests.eval.metrics.official import recorded
from vila_ops.eval.metrics.columns import Columns
from vila_ops.eval.metrics.vqa import CONTRACTIONS, CORRECTED, OFFICIAL, leave_one_out, score


def people(*answers: str) -> list[dict[str, Any]]:
    """Records as in the official file."""
    return [{"answer": one, "answer_confidence": "yes", "answer_id": number} for number, one in enumerate(answers, 1)]


def test_the_official_column_is_the_official_code() -> None:
    for item in recorded("vqa")["items"]:
        assert round(100 * score(item["answer"], item["human"]).official, 12) == item["official"], item


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The cat.", "cat"),
        ("2.5", "2.5"),
        ("1,000", "1000"),
        ("U.S.A.", "usa"),
        ("dont know", "don't know"),
        ("None", "0"),
        ("ten cats", "10 cats"),
        ("eleven", "eleven"),
        ("3/4", "3 4"),
        ("well-known", "well known"),
        ("yes, no", "yes no"),
        ("50%", "50%"),
        ("wouldntve", "wouldntve"),
        ("wouldn'tve", "wouldn't've"),
        ("a", ""),
    ],
)
def test_normal_forms(text: str, normal: str) -> None:
    assert OFFICIAL(text) == normal


def test_contractions_lack_one_apostrophe() -> None:
    assert CONTRACTIONS["yall'd've"] == CONTRACTIONS["y'alld've"] == CONTRACTIONS["y'all'dve"] == "y'all'd've"
    assert CONTRACTIONS["twas"] == "'twas"
    assert CONTRACTIONS["somebody'd"] == "somebodyd"


@pytest.mark.parametrize(("agreeing", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_soft_scores_of_ten_people(agreeing: int, accuracy: float) -> None:
    human = ["yes"] * agreeing + [f"other {number}" for number in range(10 - agreeing)]
    assert leave_one_out("yes", human) == pytest.approx(accuracy)
    both = score("yes", people(*human))
    assert (both.official, both.corrected) == (pytest.approx(accuracy), pytest.approx(accuracy))


def test_ten_equal_answers_are_not_normalised_by_the_official_code() -> None:
    assert score("Yes.", people(*["yes"] * 10)) == Columns(official=0, corrected=1)
    assert score("Yes.", people(*["yes"] * 9, "no")) == Columns(official=1, corrected=1)


def test_equal_records_without_an_id_vanish_together_in_the_official_code() -> None:
    assert score("yes", [{"answer": "yes"}] * 10) == Columns(official=0, corrected=1)


def test_dots_after_the_32nd_stay_in_the_official_code() -> None:
    assert OFFICIAL("." * 33 + "x") == ".x"
    assert CORRECTED("." * 33 + "x") == "x"


def test_an_answer_of_articles_alone_is_empty_in_the_official_code() -> None:
    human = people(*["a"] * 9, "b")
    assert score("", human) == Columns(official=1, corrected=0)
    assert score("The", human) == Columns(official=1, corrected=0)
    assert score("A", human) == Columns(official=1, corrected=1)


def test_a_normaliser_keeps_nothing_between_answers() -> None:
    assert [OFFICIAL("ten"), OFFICIAL("10"), OFFICIAL("ten")] == ["10", "10", "10"]


def test_a_question_without_human_answers_is_refused() -> None:
    with pytest.raises(ValueError, match="without human answers"):
        score("yes", [])
