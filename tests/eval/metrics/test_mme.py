import pytest

from tests.eval.metrics.official import recorded
from vila_ops.eval.metrics.columns import Columns
from vila_ops.eval.metrics.mme import MmeItem, Said, corrected_answer, mme, official_answer


def pair(image: str, yes: str, no: str, *, subtask: str = "count") -> list[MmeItem]:
    """The two questions of an image with the answers to them."""
    return [MmeItem(subtask, image, "yes", yes), MmeItem(subtask, image, "no", no)]


def test_the_official_numbers_are_those_of_the_script() -> None:
    script = recorded("mme")
    ours = mme([MmeItem(**item) for item in script["items"]])
    assert ours.perception is not None
    assert ours.cognition is not None
    assert ours.perception.official == pytest.approx(script["perception"], abs=1e-9)
    assert ours.cognition.official == pytest.approx(script["cognition"], abs=1e-9)
    assert {name: one.score.official for name, one in ours.subtasks.items()} == pytest.approx(script["subtasks"])


@pytest.mark.parametrize(
    ("text", "official", "corrected"),
    [
        ("Yes", "yes", "yes"),
        ("no\n", "no", "no"),
        ("No, there is not.", "no", "no"),
        ("not really", "no", "other"),
        ("Now it does, yes", "no", "yes"),
        ("know", "no", "other"),
        ("Eyes", "yes", "other"),
        ("It is: no", "other", "no"),
        ("**No**", "no", "no"),
        ("Answer: **No**", "other", "no"),
        ("ＮＯ", "other", "no"),  # full width
        ("Yes, the photo depicts a gravestone with a death notice.", "yes", "yes"),  # VLMEvalKit#73
        ("maybe", "other", "other"),
        ("", "other", "other"),
    ],
)
def test_answers_are_read(text: str, official: Said, corrected: Said) -> None:
    assert official_answer(text) == official
    assert corrected_answer(text) == corrected


def test_a_subtask_by_hand() -> None:
    subtask = mme([*pair("a", "yes", "no"), *pair("b", "yes", "yes")]).subtasks["count"]
    assert subtask.accuracy == Columns(0.75, 0.75)
    assert subtask.accuracy_plus == Columns(0.5, 0.5)
    assert subtask.score == Columns(125, 125)


def test_the_questions_of_an_image_may_be_apart() -> None:
    first, second = pair("a", "yes", "no"), pair("b", "yes", "no")
    assert mme([first[0], second[1], first[1], second[0]]).subtasks["count"].score == Columns(200, 200)


def test_a_score_without_all_its_subtasks_is_none() -> None:
    result = mme(pair("a", "yes", "no"))
    assert (result.perception, result.cognition) == (None, None)


def test_an_image_without_two_questions_is_named() -> None:
    with pytest.raises(ValueError, match="1 images have not two answered questions, such as 'b' of 'count' with 1"):
        mme([*pair("a", "yes", "no"), pair("b", "yes", "no")[0]])
    with pytest.raises(ValueError, match="'a' of 'count' with 4"):
        mme(pair("a", "yes", "no") * 2)


def test_no_items_are_refused() -> None:
    with pytest.raises(ValueError, match="no items"):
        mme([])
