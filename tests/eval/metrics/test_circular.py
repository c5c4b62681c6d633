from typing import Any

import pytest

from tests.eval.metrics.official import recorded
from vila_ops.eval.metrics.circular import CircularResult, Rotation, circular

TEXTS = ("cat", "dog", "eel")


def rotations(answers: list[str | None], *, index: int = 7) -> list[Rotation]:
    """A question with three options, of which "cat" is right; the letters of an answer are those of its rotation."""
    return [
        Rotation(
            index=index + number * 1_000_000,
            truth="ACB"[number],
            options=dict(zip("ABC", TEXTS[number:] + TEXTS[:number], strict=True)),
            answer=answer,
        )
        for number, answer in enumerate(answers)
    ]


def test_the_official_column_is_that_of_vlmevalkit() -> None:
    script = recorded("circular")
    results = circular([Rotation(**item) for item in script["items"]])
    official: dict[str, Any] = {str(index): one.official for index, one in results.items() if one.official is not None}
    assert official == script["hits"]


def test_a_question_is_right_if_every_rotation_is() -> None:
    assert circular(rotations(["A", "C.", "cat"])) == {7: CircularResult(official=1, outcome="right", missing=())}


def test_one_wrong_rotation_is_enough() -> None:
    result = circular(rotations(["A", "C", "A"]))[7]
    assert (result.official, result.outcome, result.corrected) == (0, "wrong", 0)


def test_an_unreadable_answer_is_wrong() -> None:
    result = circular(rotations(["A", "C", "hm"]))[7]
    assert (result.official, result.outcome) == (0, "wrong")


@pytest.mark.parametrize("absent", [1, 2])
def test_a_question_without_one_rotation_is_incomplete_and_not_right(absent: int) -> None:
    rows = rotations(["A", "C", "B"])
    del rows[absent]
    result = circular(rows)[7]
    assert (result.official, result.outcome, result.missing, result.corrected) == (1, "incomplete", (absent,), 0)


def test_a_failed_request_is_a_missing_rotation() -> None:
    assert circular(rotations(["A", None, "B"]))[7] == CircularResult(1, "incomplete", (1,))


def test_a_wrong_rotation_decides_beside_a_missing_one() -> None:
    assert circular(rotations(["A", None, "A"]))[7] == CircularResult(0, "wrong", (1,))


def test_the_official_code_drops_a_question_without_its_first_row() -> None:
    assert circular(rotations([None, "C", "B"]))[7] == CircularResult(None, "incomplete", (0,))


def test_doubled_rows_are_named() -> None:
    with pytest.raises(ValueError, match="1 rows occur more than once, such as index 7"):
        circular([*rotations(["A", "C", "B"]), rotations(["A"])[0]])


def test_rotations_of_other_sizes_are_named() -> None:
    odd = Rotation(1_000_007, "A", {"A": "cat", "B": "dog"}, "A")
    with pytest.raises(ValueError, match=r"question 7 have \[2, 3\] options"):
        circular([rotations(["A"])[0], odd])


def test_a_rotation_too_many_is_named() -> None:
    extra = Rotation(3_000_007, "A", dict(zip("ABC", TEXTS, strict=True)), "A")
    with pytest.raises(ValueError, match="question 7 has 3 options and a rotation 3"):
        circular([*rotations(["A", "C", "B"]), extra])
