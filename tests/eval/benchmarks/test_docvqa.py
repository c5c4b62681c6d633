"""DocVQA from its official files to numbers and upload file."""

import json
import shutil
from pathlib import Path

import pytest

from tests.eval.benchmarks.sample import SAMPLES, config_of, numbers, rows_of, sample_items
from vila_ops.config.benchmarks import DocVqa
from vila_ops.eval.benchmarks import docvqa

CONFIG, TEST = config_of(DocVqa), config_of(DocVqa, split="test")
REPLIES = {"49153": "ada byron", "49154": "4 May 1843", "50001": "$1204.50", "50002": "pag"}


def test_the_numbers_by_hand() -> None:
    items = sample_items(CONFIG)
    rows = rows_of(items, CONFIG, lambda item, _: REPLIES[item.id])
    # "$1204.50" lacks one of the 9 characters of "$1,204.50"; "pag" is half of "page 3", which the definition counts 0.
    official, corrected = (1 + 1 + 8 / 9 + 0.5) / 4, (1 + 1 + 8 / 9) / 4
    assert numbers(rows, items, CONFIG) == pytest.approx(
        {"docvqa_anls_official": official, "docvqa_anls_corrected": corrected}
    )


def test_the_upload_has_every_question_of_the_split_and_the_test_split_has_no_number() -> None:
    items = sample_items(TEST)
    rows = rows_of(items, TEST, lambda item, _: None if item.id == "60002" else "Charles")
    assert numbers(rows, items, TEST) == {}
    (name, content), *others = docvqa.official_files(items, rows, TEST).items()
    assert (name, others) == ("docvqa_test_results.json", [])
    assert json.loads(content) == [{"questionId": 60001, "answer": "Charles"}, {"questionId": 60002, "answer": ""}]


def test_a_file_of_another_split_and_a_question_without_answers_are_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(SAMPLES / "docvqa", tmp_path / "docvqa"))
    val, test = folder / "val_v1.0.json", folder / "test_v1.0.json"
    text = val.read_text()
    val.write_text(test.read_text())
    with pytest.raises(ValueError, match=r"val_v1.0.json is of the split test, and val is asked for"):
        list(docvqa.read(folder, CONFIG))
    content = json.loads(text)
    content["data"][2]["answers"] = []
    val.write_text("\ufeff" + json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match="question 50001 has no answers"):
        list(docvqa.read(folder, CONFIG))


def test_the_names_of_the_later_download_are_read(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(SAMPLES / "docvqa", tmp_path / "docvqa"))
    (folder / "val_v1.0.json").rename(folder / "val_v1.0_withQT.json")
    (folder / "documents").rename(folder / "spdocvqa_images")
    items = list(docvqa.read(folder, CONFIG))
    assert items == sample_items(CONFIG)
    assert not any(item.problem() for item in items)


def test_an_answer_of_100000_characters_is_wrong() -> None:
    items = sample_items(CONFIG)
    by_name = numbers(rows_of(items, CONFIG, lambda item, _: "a" * 100_000), items, CONFIG)
    assert set(by_name.values()) == {0}
