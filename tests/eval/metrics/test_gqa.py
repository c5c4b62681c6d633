from typing import Any

import pytest

from tests.eval.metrics.official import recorded
from vila_ops.eval.metrics.columns import Columns
from vila_ops.eval.metrics.gqa import gqa, prediction, score


def question(answer: str = "yes", **changes: Any) -> dict[str, Any]:
    return {
        "answer": answer,
        "isBalanced": True,
        "types": {"structural": "verify", "detailed": "existAttrC"},
        "groups": {"global": None},
        "entailed": [],
    } | changes


def test_the_numbers_are_those_of_the_script() -> None:
    for case in recorded("gqa")["items"]:
        ours = gqa(case["questions"], case["answers"], case["choices"])
        in_percent = {
            "accuracy": ours.accuracy.official,
            "binary": ours.binary.official if ours.binary else 0,
            "open": ours.open.official if ours.open else 0,
            "consistency": ours.consistency or 0,
            "validity": ours.validity or 0,
            "plausibility": ours.plausibility or 0,
        }
        distribution = case["official"].pop("distribution")
        assert {name: 100 * value for name, value in in_percent.items()} == pytest.approx(case["official"]), case
        assert ours.distribution == pytest.approx(distribution), case


def test_a_prediction_is_in_lower_case_without_a_dot_at_its_end() -> None:
    assert prediction("Yes.") == "yes"
    assert score("Yes.", question()) == Columns(1, 1)
    assert score("Yes, it is.", question()) == Columns(0, 0)


def test_space_around_an_answer_is_wrong_in_the_official_column_alone() -> None:
    assert score(" Yes. \n", question()) == Columns(official=0, corrected=1)


def test_only_balanced_questions_count() -> None:
    result = gqa({"1": question(), "2": question(isBalanced=False)}, {"1": "yes"})
    assert list(result.items) == ["1"]
    assert result.accuracy == Columns(1, 1)


def test_what_cannot_be_computed_is_none() -> None:
    result = gqa({"1": question()}, {"1": "yes"})
    assert (result.open, result.consistency, result.validity, result.plausibility, result.distribution) == (None,) * 5


def test_a_right_answer_is_consistent_with_what_it_entails() -> None:
    questions = {
        "1": question(entailed=["1", "2", "3", "unknown"]),
        "2": question("no", isBalanced=False),
        "3": question("red", isBalanced=False),
    }
    assert gqa(questions, {"1": "yes", "2": "no", "3": "blue"}).consistency == 0.5
    assert gqa(questions, {"1": "no", "2": "no", "3": "blue"}).consistency is None
    with pytest.raises(ValueError, match="question 1 entails 3"):
        gqa(questions, {"1": "yes", "2": "no"})


def test_missing_answers_are_named() -> None:
    with pytest.raises(ValueError, match="no answer to 1 balanced questions: 2"):
        gqa({"1": question(), "2": question()}, {"1": "yes"})


def test_questions_that_are_all_unbalanced_are_refused() -> None:
    with pytest.raises(ValueError, match="none of the questions is balanced"):
        gqa({"1": question(isBalanced=False)}, {"1": "yes"})
