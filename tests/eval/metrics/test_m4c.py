from typing import Any

import pytest

from tests.eval.metrics.official import recorded
from vila_ops.eval.metrics.columns import Columns
from vila_ops.eval.metrics.m4c import normalize, stvqa_accuracy, stvqa_anls, textvqa


def test_the_official_column_is_the_official_code() -> None:
    for item in recorded("m4c")["items"]:
        answer, human = item["answer"], item["human"]
        assert normalize(answer) == item["normal"], item
        assert textvqa(answer, human).official == item["textvqa"], item
        assert stvqa_accuracy(answer, human).official == item["stvqa_accuracy"], item
        assert stvqa_anls(answer, human).official == item["stvqa_anls"], item


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
        ("girl's", "girl 's"),
        ("10:30 a.m.", "10:30 am"),
        ("a", ""),
        ("3/4", "3 4"),
        ("$5.00", "$5.00"),
        ("well-known", "well known"),
        ("A B", "b"),
        ("v1.2.3", "v1.2.3"),
        ("50%", "50%"),
    ],
)
def test_normal_forms(text: str, normal: str) -> None:
    """Made with LLaVA's file."""
    assert normalize(text) == normal


def test_three_of_ten_people_are_not_enough_for_a_full_score() -> None:
    assert textvqa("Nine", ["9"] * 3 + ["eight"] * 7) == Columns(pytest.approx(0.9), pytest.approx(0.9))


def test_an_answer_of_articles_alone_is_empty_in_the_official_code() -> None:
    assert textvqa("", ["a"] * 10) == Columns(official=1, corrected=0)
    assert stvqa_accuracy("the", ["a"]) == Columns(official=1, corrected=0)


def test_half_a_distance_counts_in_the_evaluator_alone() -> None:
    assert stvqa_anls("ab", ["ax"]) == Columns(official=0.5, corrected=0)
    assert stvqa_anls("Abc ", ["abd"]) == Columns(pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert stvqa_anls("", [""]) == Columns(1, 1)  # the evaluator fails here


def test_textvqa_needs_ten_people() -> None:
    with pytest.raises(ValueError, match="9 human answers"):
        textvqa("a", ["a"] * 9)


@pytest.mark.parametrize("metric", [stvqa_accuracy, stvqa_anls])
def test_a_question_without_references_is_refused(metric: Any) -> None:
    with pytest.raises(ValueError, match="without references"):
        metric("a", [])
