"""VQAv2 from its official files to numbers and results; the official code's rules are tested in metrics/."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.eval.benchmarks.sample import SAMPLES, config_of, copy_of, numbers, rows_of, sample_items
from vila_ops.config.benchmarks import VqaV2
from vila_ops.eval.benchmark import Item
from vila_ops.eval.benchmarks import vqav2

CONFIG = config_of(VqaV2)
ANSWERS = {"1000": "Red.", "1001": "one", "2000": "no", "2001": "two", "3000": "tent", "3001": ""}


def reply(item: Item, rotation: int) -> str:
    return ANSWERS[item.id]


def test_the_numbers_by_hand() -> None:
    items = sample_items(CONFIG)
    by_name = numbers(rows_of(items, CONFIG, reply), items, CONFIG)
    # 1000 and 2001: ten equal answers, which the official code compares as they are: 0, corrected 1. 1001: "one" is
    # "1", and so are all ten. 2000: one of ten says no, which is worth 0.3. 3000: three say tent, 0.9.
    assert by_name["vqav2_official"] == pytest.approx((0 + 1 + 0.3 + 0 + 0.9 + 0) / 6)
    assert by_name["vqav2_corrected"] == pytest.approx((1 + 1 + 0.3 + 1 + 0.9 + 0) / 6)


def test_questions_of_an_image_are_one_group_and_have_their_type() -> None:
    items = sample_items(CONFIG)
    assert [item.group[-6:-4] for item in items] == ["01", "01", "02", "02", "03", "03"]
    assert [item.slices for item in items[:3]] == [
        ("answer_type: other",),
        ("answer_type: number",),
        ("answer_type: yes/no",),
    ]


def test_the_results_are_the_answers_in_the_order_of_the_questions() -> None:
    items = sample_items(CONFIG)
    files = vqav2.official_files(items, rows_of(items, CONFIG, reply), CONFIG)
    (content,) = files.values()
    assert list(files) == ["v2_OpenEnded_mscoco_val2014_vila_results.json"]
    assert json.loads(content) == [{"question_id": int(id_), "answer": answer} for id_, answer in ANSWERS.items()]


def test_the_upload_of_test_dev_has_every_question_of_test_and_normalised_answers() -> None:
    config = config_of(VqaV2, split="test-dev2015")
    items = sample_items(config)
    assert [item.id for item in items] == ["5001", "6000"]
    rows = rows_of(items, config, lambda item, _: {"5001": "Yes.", "6000": "A square"}[item.id])
    assert numbers(rows, items, config) == {}
    (content,) = vqav2.official_files(items, rows, config).values()
    records = {one["question_id"]: one["answer"] for one in json.loads(content)}
    assert records == {5001: "yes", 6000: "square", 5000: "", 6001: ""}


def change(folder: Path, name: str, own: Any) -> None:
    content = json.loads((folder / name).read_text())
    own(content)
    (folder / name).write_text(json.dumps(content))


ANNOTATIONS, QUESTIONS = "v2_mscoco_val2014_annotations.json", "v2_OpenEnded_mscoco_val2014_questions.json"


@pytest.mark.parametrize(
    ("name", "own", "message"),
    [
        (ANNOTATIONS, lambda content: content["annotations"].pop(1), "has no answers to question 1001"),
        (ANNOTATIONS, lambda content: content["annotations"].append(content["annotations"][0]), "1 questions twice"),
        (ANNOTATIONS, lambda content: content["annotations"][0].update(answers=[]), "question 1000 has no human"),
        (ANNOTATIONS, lambda content: content.pop("annotations"), "record 1 has no 'annotations'"),
        (QUESTIONS, lambda content: content.update(data_subtype="train2014"), "has the questions of train2014"),
        (QUESTIONS, lambda content: content["questions"][1].pop("image_id"), "record 2 has no 'image_id'"),
    ],
)
def test_a_faulty_file_is_named(name: str, own: Any, message: str, tmp_path: Path) -> None:
    folder = copy_of("vqav2", tmp_path)
    change(folder, name, own)
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        list(vqav2.read(folder, CONFIG))


def test_test_dev_of_another_version_than_test_is_refused(tmp_path: Path) -> None:
    folder = copy_of("vqav2", tmp_path)
    change(folder, "v2_OpenEnded_mscoco_test2015_questions.json", lambda content: content["questions"].pop(1))
    with pytest.raises(ValueError, match="question 5001 is not in test2015"):
        list(vqav2.read(folder, config_of(VqaV2, split="test-dev2015")))


def test_the_sample_has_the_keys_of_the_official_file() -> None:
    content = json.loads((SAMPLES / "vqav2" / ANNOTATIONS).read_text())
    assert set(content["annotations"][0]) == {
        *("question_type", "multiple_choice_answer", "answers", "image_id", "answer_type", "question_id"),
    }
