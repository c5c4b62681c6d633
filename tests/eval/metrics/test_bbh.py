import pytest

from tests.eval.metrics.official import recorded
from vila_ops.eval.metrics.bbh import NO_ANSWER, Prompt, official_answer, score
from vila_ops.eval.metrics.columns import Columns


def test_answers_are_read_as_by_lm_evaluation_harness() -> None:
    for item in recorded("bbh")["items"]:
        assert official_answer(item["text"]) == item["answer"], item


@pytest.mark.parametrize(
    ("answer", "target", "prompt", "columns"),
    [
        ("Let's think. So the answer is (A).", "(A)", "chain_of_thought", Columns(1, 1)),
        ("So the answer is (A)", "(A)", "chain_of_thought", Columns(0, 1)),
        ("So the answer is A.", "(A)", "chain_of_thought", Columns(0, 1)),
        ("the answer is True. No, the answer is False.", "False", "chain_of_thought", Columns(0, 1)),
        ("The answer is valid.", "valid", "chain_of_thought", Columns(0, 1)),
        ("valid", "valid", "chain_of_thought", Columns(0, 1)),
        ("So the answer is (B).", "(A)", "chain_of_thought", Columns(0, 0)),
        ("", "(A)", "chain_of_thought", Columns(0, 0)),
        ("(A)", "(A)", "direct", Columns(1, 1)),
        (" (A)\n\nQ: next", "(A)", "direct", Columns(0, 1)),
        ("true.", "True", "direct", Columns(0, 1)),
        ("] ]  }", "] ] }", "direct", Columns(0, 1)),
        ("", "True", "direct", Columns(0, 0)),
    ],
)
def test_scores(answer: str, target: str, prompt: Prompt, columns: Columns) -> None:
    assert score(answer, target, prompt=prompt) == columns


def test_no_stated_answer_has_a_name() -> None:
    assert official_answer("I do not know") == NO_ANSWER
