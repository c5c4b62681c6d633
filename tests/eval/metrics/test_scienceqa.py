import pytest

from tests.eval.metrics.official import recorded
from vila_ops.eval.metrics.columns import Columns
from vila_ops.eval.metrics.scienceqa import Problem, official_letter, scienceqa, score

PROBLEM = Problem(("cat", "dog", "eel"), answer=1, has_image=True)


def test_the_official_column_is_that_of_the_script() -> None:
    script = recorded("scienceqa")
    problems = {item["id"]: Problem(tuple(item["choices"]), item["answer"], item["image"]) for item in script["items"]}
    answers = {item["id"]: item["text"] for item in script["items"] if item["text"] is not None}
    result = scienceqa(problems, answers)
    assert {id_: bool(one.official) for id_, one in result.items.items()} == {
        item["id"]: item["official"] for item in script["items"]
    }
    assert result.accuracy.official == pytest.approx(script["accuracy"])
    assert result.image_accuracy is not None
    assert result.image_accuracy.official == pytest.approx(script["image_accuracy"])


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B. dog", "B"),
        ("B.", None),
        ("(B)", None),
        ("The answer is B.", "B"),
        ("The answer is B", None),
        ("The answer is Because", "B"),
        ("The answer is A. The answer is B.", None),
        ("the answer is B.", None),
        ("AB", None),
        ("", None),
    ],
)
def test_answers_are_read_as_by_the_script(text: str, letter: str | None) -> None:
    assert official_letter(text) == letter


@pytest.mark.parametrize("text", ["B.", "(B)", "the answer is B", "dog"])
def test_answers_that_only_the_corrected_column_reads(text: str) -> None:
    assert score(PROBLEM, text) == Columns(official=0, corrected=1)


def test_an_unanswered_question_leaves_the_official_image_subset() -> None:
    problems = {"1": PROBLEM, "2": PROBLEM, "3": Problem(("cat", "dog"), answer=0, has_image=False)}
    result = scienceqa(problems, {"1": "B", "3": "B"})
    assert result.accuracy == Columns(1 / 3, 1 / 3)
    assert result.image_accuracy == Columns(official=1, corrected=0.5)


def test_a_set_without_images_has_no_image_accuracy() -> None:
    assert scienceqa({"1": Problem(("cat", "dog"), 0, has_image=False)}, {"1": "A"}).image_accuracy is None


def test_answers_to_other_problems_are_named() -> None:
    with pytest.raises(ValueError, match="1 answers are to none of the problems: 9"):
        scienceqa({"1": PROBLEM}, {"9": "A"})
