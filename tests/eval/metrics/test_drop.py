from typing import Any

import pytest

from tests.eval.metrics.official import recorded
from vila_ops.eval.metrics.columns import Columns
from vila_ops.eval.metrics.drop import score, true_spans


def test_the_official_column_is_the_official_code() -> None:
    for item in recorded("drop")["items"]:
        result = score(item["spans"], item["truths"])
        assert (result.exact_match.official, result.f1.official) == (item["exact_match"], item["f1"]), item


@pytest.mark.parametrize(
    ("spans", "truth", "exact_match", "f1"),
    [
        (["78"], ["78.0"], 1, 1),
        (["td"], ["td", "td"], 0, 0.5),
        (["the", "fat", "cat", "the fat", "fat cat", "the fat cat"], ["cat"], 0, 0.17),
        (["the a NOT an ARTICLE the an a"], ["NOT ARTICLE"], 1, 1),
        (["John Elton"], ["Elton John"], 0, 1),
        (["Per.i.o.d...."], [".P....e.r,,i;;;o...d,,"], 1, 1),
        (["78-yard"], ["78 yard"], 1, 1),
        (["78"], ["78-yard"], 0, 0.67),
        (["yard"], ["36 yard td"], 0, 0),
        (["23 yards"], ["43 yards"], 0, 0),
        (["56 yards"], ["56 yd"], 0, 0.5),
        (["78-yard", "56", "28", "40", "44", "touchdown"], ["78-yard", "56 yard", "1 yard touchdown"], 0, 0.28),
        (["23", "23 yard"], ["23-yard", "56 yards"], 0, 0.5),
        (["John Karman", "Joe Hardy"], ["Joe Karman", "John Hardy"], 0, 0.5),
        (["ottoman", "Kantakouzenous"], ["ottoman", "army of Kantakouzenous"], 0, 0.75),
    ],
)
def test_examples_of_the_official_tests(spans: list[str], truth: list[str], exact_match: float, f1: float) -> None:
    result = score(spans, [truth])
    assert (result.exact_match.official, result.f1.official) == (exact_match, f1)


def test_the_best_true_answer_counts_and_a_blank_one_does_not() -> None:
    assert score(["5"], [["7 meters"], ["5"]]).exact_match == Columns(1, 1)
    assert score([" "], [["  "]]).f1 == Columns(0, 0)


@pytest.mark.parametrize(
    ("spans", "truth", "exact_match"),
    [
        (["10\n\nPassage"], ["10 passage"], Columns(0, 1)),
        (["$12.50"], ["12.5"], Columns(0, 1)),
        (["5.5%"], ["5.5"], Columns(0, 1)),
        (["1,000"], ["1000"], Columns(1, 1)),
        (["1_000"], ["1000"], Columns(1, 1)),  # a mark is removed where it is no number
        (["Infinity"], ["inf"], Columns(1, 0)),
        (["a", "cat", "cat", "dog"], ["cat", "dog", "dog", "the"], Columns(1, 0)),
    ],
)
def test_differences_of_the_columns(spans: list[str], truth: list[str], exact_match: Columns) -> None:
    assert score(spans, [truth]).exact_match == exact_match


def test_f1_is_rounded_in_the_official_column_alone() -> None:
    assert score(["78"], [["78-yard"]]).f1 == Columns(0.67, pytest.approx(2 / 3))


@pytest.mark.parametrize(
    ("answer", "spans"),
    [
        ({"number": "3", "spans": [], "date": {}}, ("3",)),
        ({"number": 3}, ("3",)),
        ({"number": "", "spans": ["a", "b"], "date": {}}, ("a", "b")),
        ({"number": "", "spans": [], "date": {"day": "17", "month": "August", "year": ""}}, ("17 August ",)),
    ],
)
def test_true_answers_become_spans(answer: dict[str, Any], spans: tuple[str, ...]) -> None:
    assert true_spans(answer) == spans


def test_an_answer_of_no_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="the keys of an answer are number, text"):
        true_spans({"number": "", "text": "x"})


def test_missing_spans_are_refused() -> None:
    for spans, truths in (([], [["a"]]), (["a"], []), (["a"], [[]])):
        with pytest.raises(ValueError, match="at least one span"):
            score(spans, truths)
