import pytest

from tests.eval.metrics.official import recorded
from vila_ops.eval.metrics.letters import corrected_letter, exact_letter, first_letter, vlmeval_letter

OPTIONS = {"A": "a cat", "B": "red", "C": "red car", "D": "12"}


def test_the_rule_of_vlmevalkit_is_that_of_its_code() -> None:
    for item in recorded("letters")["items"]:
        assert vlmeval_letter(item["answer"], item["options"]) == item["letter"], item


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("b.", "B"),
        ("**B**", "B"),
        (" B\n", "B"),
        ("B. red", "B"),
        ("B: because it is", "B"),
        ("(B) red", "B"),
        ("The answer is B because A is too small", "B"),
        ("answer: (C)", "C"),
        ("Option D", "D"),
        ("The answer is A. No, the answer is C.", "C"),
        ("I would say C", "C"),
        ("red", "B"),  # the whole text of an option that is part of another
        ("Red car.", "C"),
        ("12", "D"),
        ("It is a cat", "A"),
        ("A dog sits there", None),  # an article
        ("A dog, so C", "C"),
        ("I'm not sure", None),
        ("B or C", None),
        ("It is a red car", None),  # two options' texts
        ("E", None),
        ("none", None),
        ("112", None),
        ("Bread", None),
        ("Answer: **D**", "D"),  # OPD-V#2
        ("I considered (A), but it is incorrect. Final answer: D.", "D"),
        ("The correct answer is d.", "D"),
        ("answer: (b) red", "B"),
        ("the answer is a cat, or d", "A"),  # an article, and the text of A
        ("The answer is B. Note that A is a common distractor.", "B"),  # omlx#3668
        ("ANSWER: BD", None),  # evals#1767
        ("ANSWER: B\nActually, ANSWER: C", "C"),
        ("\uff22", "B"),  # full width, lmms-eval#1415
        ("\uff08\uff22\uff09\u3002", "B"),
        ("", None),
    ],
)
def test_letters_that_people_read(answer: str, letter: str | None) -> None:
    assert corrected_letter(answer, OPTIONS) == letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("答案是B", "B"),
        ("正确答案：B。", "B"),
        ("选B", "B"),
        ("应选择（C）。", "C"),
        ("我认为A不对，答案是C", "C"),
        ("红色。", "B"),
        ("它是红色的。", "B"),
        ("A和B都对", None),
        ("답은 C입니다", "C"),
        ("答えはAです", "A"),
    ],
)
def test_letters_between_characters_without_spaces_are_read(answer: str, letter: str | None) -> None:
    assert corrected_letter(answer, {"A": "绿色", "B": "红色", "C": "12 只"}) == letter


@pytest.mark.parametrize(
    "answer", ["\n\t ", "(((((", "x" * 100_000, "A" * 100_000, "(" * 100_000, "A " * 50_000, "\ud83d"]
)
def test_any_answer_is_read(answer: str) -> None:
    assert corrected_letter(answer, OPTIONS) in (None, "A")


def test_rules_of_seed_bench() -> None:
    assert exact_letter("B.") == "B."
    assert first_letter(" b) red") == "B"
    assert first_letter("") == ""
