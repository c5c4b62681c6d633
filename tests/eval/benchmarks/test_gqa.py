"""GQA from its official files to numbers and predictions; the script's rules are tested in metrics/."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.eval.benchmarks.sample import SAMPLES, config_of, copy_of, numbers, rows_of, sample_items
from vila_ops.config.benchmarks import Gqa
from vila_ops.eval.benchmark import Item
from vila_ops.eval.benchmarks import gqa
from vila_ops.eval.metrics import gqa as script

CONFIG = config_of(Gqa)
FILE = "testdev_balanced_questions.json"
GIVEN = ("Red.", "Yes. ", "no", "blue", "green", "circle", "yes", "No")
ANSWERS = {str(20001 + number): answer for number, answer in enumerate(GIVEN)}


def reply(item: Item, rotation: int) -> str:
    return ANSWERS[item.id]


def test_the_numbers_by_hand() -> None:
    items = sample_items(CONFIG)
    by_name = numbers(rows_of(items, CONFIG, reply), items, CONFIG)
    # "Yes. " keeps its space and so its dot in the official column. blue and circle are wrong.
    assert by_name["gqa_official"] == 5 / 8
    assert by_name["gqa_corrected"] == 6 / 8
    assert by_name["gqa_open_official"] == pytest.approx(1 / 3)  # 20001 of 20001, 20004, 20006
    assert by_name["gqa_binary_official"] == 4 / 5
    assert by_name["gqa_binary_corrected"] == 1
    # 20001 is right and entails 20002 (wrong) and 20003 (right); 20005 is right and entails 20004 (wrong).
    assert by_name["gqa_consistency"] == (1 / 2 + 0) / 2
    # color: red 1, green 2, given red 1, green 1: (1 - 2)^2 / 2 x 3 questions. shape: triangle 1, given none: 1 x 1.
    assert by_name["gqa_distribution"] == pytest.approx((0.5 * 3 + 1 * 1) / 4 / 100)


def test_the_numbers_are_those_of_the_script_on_the_predictions() -> None:
    items = sample_items(CONFIG)
    rows = rows_of(items, CONFIG, reply)
    by_name = numbers(rows, items, CONFIG)
    records = json.loads(gqa.official_files(items, rows, CONFIG)["testdev_balanced_predictions.json"])
    assert [one["questionId"] for one in records] == list(ANSWERS)
    questions = json.loads((SAMPLES / "gqa" / FILE).read_text())
    official = script.gqa(questions, {one["questionId"]: one["prediction"] for one in records})
    assert by_name["gqa_official"] == official.accuracy.official
    assert by_name["gqa_consistency"] == official.consistency
    assert by_name["gqa_distribution"] == pytest.approx(official.distribution)


def test_without_answers_nothing_is_consistent_and_nothing_fails() -> None:
    items = sample_items(CONFIG)
    by_name = numbers(rows_of(items, CONFIG, lambda *_: ""), items, CONFIG)
    assert by_name["gqa_official"] == 0
    assert "gqa_consistency" not in by_name
    assert by_name["gqa_distribution"] == pytest.approx(((1 + 2) * 3 + 1 * 1) / 4 / 100)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (lambda content: content["20002"].update(isBalanced=False), "question 20002 is not balanced"),
        (lambda content: content["20002"].pop("groups"), "record 2 has no 'groups'"),
        (lambda content: content.clear(), "has no record"),
    ],
)
def test_a_faulty_file_is_named(own: Any, message: str, tmp_path: Path) -> None:
    folder = copy_of("gqa", tmp_path)
    content = json.loads((folder / FILE).read_text())
    own(content)
    (folder / FILE).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{FILE}.*{message}"):
        list(gqa.read(folder, CONFIG))


def test_a_list_of_questions_is_another_version(tmp_path: Path) -> None:
    folder = copy_of("gqa", tmp_path)
    (folder / FILE).write_text("[]")
    with pytest.raises(ValueError, match="no object of questions by id; the file is of another version"):
        list(gqa.read(folder, CONFIG))
