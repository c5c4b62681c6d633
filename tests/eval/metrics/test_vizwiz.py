import random

import pytest
from sklearn.metrics import average_precision_score, f1_score

from tests.eval.metrics.official import recorded
from vila_ops.eval.metrics.columns import Columns
from vila_ops.eval.metrics.vizwiz import Unanswerability, says_unanswerable, score, unanswerability


def test_the_official_column_is_the_official_code() -> None:
    for item in recorded("vizwiz")["items"]:
        assert score(item["answer"], item["human"]).official == item["official"], item


def test_human_answers_are_not_normalised_by_the_official_code() -> None:
    assert score("two dogs", ["2 dogs."] * 10) == Columns(official=0, corrected=1)
    assert score("the beach", ["the beach"] * 10) == Columns(official=0, corrected=1)


def test_the_official_list_has_typographic_apostrophes() -> None:
    assert score("dont know", ["don't know"] * 10) == Columns(official=0, corrected=1)
    assert score("dont know", ["don’t know"] * 10) == Columns(official=1, corrected=1)
    assert score("cant tell", ["can't tell"] * 10) == Columns(official=1, corrected=1)  # one of few plain ones


def test_three_of_ten_people() -> None:
    assert score("Basil", ["basil"] * 3 + ["oregano"] * 7) == Columns(pytest.approx(0.9), pytest.approx(0.9))


@pytest.mark.parametrize(
    ("answer", "said"), [("Unanswerable", True), ("unanswerable.", True), ("it is unanswerable", False), ("", False)]
)
def test_the_word_for_questions_without_an_answer(answer: str, said: bool) -> None:
    assert says_unanswerable(answer) is said


def test_numbers_of_unanswerability_are_those_of_scikit_learn() -> None:
    """The official code calls its average_precision_score and f1_score."""
    generator = random.Random(0)
    for _ in range(50):
        size = generator.randint(1, 40)
        answerable = [generator.random() < 0.6 for _ in range(size)] + [False]
        scores = [generator.choice((0, 1, 0.5, 0.25, generator.random())) for _ in range(size + 1)]
        labels, values = [not one for one in answerable], [1 - one for one in scores]
        ours = unanswerability(answerable, scores)
        assert ours.average_precision == pytest.approx(average_precision_score(labels, values), abs=1e-12)
        assert ours.f1 == pytest.approx(f1_score(labels, [one > 0.5 for one in values], zero_division=0), abs=1e-12)


def test_questions_that_can_all_be_answered() -> None:
    assert unanswerability([True, True], [0.9, 0.1]) == Unanswerability(average_precision=0, f1=0)


def test_every_question_has_a_score_from_0_to_1() -> None:
    with pytest.raises(ValueError, match="2 questions and 1 scores"):
        unanswerability([True, False], [1])
    with pytest.raises(ValueError, match="0 questions"):
        unanswerability([], [])
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="outside of 0 to 1"):
            unanswerability([True], [wrong])
