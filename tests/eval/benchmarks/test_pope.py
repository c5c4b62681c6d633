"""POPE from its official files to numbers and answer files; the official script's rules are tested in metrics/."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.eval.benchmarks.sample import SAMPLES, config_of, rows_of, sample_items
from vila_ops.config.benchmarks import Pope
from vila_ops.config.eval import MeasureSettings
from vila_ops.eval.benchmark import Item
from vila_ops.eval.benchmarks import pope
from vila_ops.eval.metrics.pope import official_in_order
from vila_ops.eval.scoring import score

CONFIG = config_of(Pope, version=None)
SETTINGS = MeasureSettings(bootstrap_resamples=100)


def lines(name: str) -> list[dict[str, Any]]:
    text = (SAMPLES / f"pope/coco_pope_{name}.json").read_text()
    return [json.loads(line) for line in text.splitlines()]


def reply(item: Item, rotation: int) -> str:
    """Right for the first image, "NO" for the second, empty for the third, always yes for the fourth."""
    label = item.references["label"]
    return {"1": label.capitalize() + ".", "2": "NO", "3": "", "4": "Yes, there is."}[item.group[-5]]


def values(rows: list[Any], items: list[Item], config: Pope = CONFIG) -> dict[str, float]:
    return {metric.name: metric.value for metric in score(items, rows, config, SETTINGS).measurement.metrics}


def test_a_question_of_several_files_is_asked_once_and_counts_in_each() -> None:
    items = sample_items(CONFIG)
    # 4 images with 3 questions for what they show, in all files, and 3 others of each of 3 files.
    assert len(items) == 4 * (3 + 9)
    assert sum(len(lines(name)) for name in pope.SETS) == 72
    shown = [item for item in items if item.references["label"] == "yes"]
    assert {item.slices for item in shown} == {pope.SETS}
    assert {item.slices for item in items if item not in shown} == {("random",), ("popular",), ("adversarial",)}
    assert len({item.group for item in items}) == 4


def test_the_numbers_by_hand() -> None:
    items = sample_items(CONFIG)
    by_name = values(rows_of(items, CONFIG, reply), items)
    # Of each file: 3 yes and 3 no on each image. The script reads "NO" and "" as yes, so images 2, 3 and 4 are all yes:
    # 12 true positives, 9 false positives, 3 true negatives.
    # Corrected: image 2 is all no (3 right), an empty answer is wrong (none right), image 4 all yes (3 right):
    # 6 true positives, 3 + 3 false positives, 6 true negatives, 3 + 3 false negatives.
    for name in pope.SETS:
        official, corrected = (f"pope_{name}_{{}}_{column}".format for column in ("official", "corrected"))
        assert by_name[official("accuracy")] == pytest.approx(15 / 24)
        assert by_name[official("precision")] == pytest.approx(12 / 21)
        assert by_name[official("recall")] == 1
        assert by_name[official("yes_ratio")] == pytest.approx(21 / 24)
        assert by_name[corrected("accuracy")] == pytest.approx(12 / 24)
        assert by_name[corrected("f1")] == pytest.approx(2 * 6 / (2 * 6 + 6 + 6))
    assert by_name["pope_f1_official"] == pytest.approx(2 * 12 / (2 * 12 + 9))
    assert by_name["pope_f1_corrected"] == pytest.approx(1 / 2)


def test_the_answer_files_are_in_the_official_order_and_give_the_official_numbers() -> None:
    items = sample_items(CONFIG)
    rows = rows_of(items, CONFIG, reply)
    by_name = values(rows, items)
    files = pope.official_files(items, rows, CONFIG)
    assert sorted(files) == [f"coco_pope_{name}_answers.json" for name in sorted(pope.SETS)]
    for name in pope.SETS:
        answers = [json.loads(line) for line in files[f"coco_pope_{name}_answers.json"].decode().splitlines()]
        assert [one["question"] for one in answers] == [one["text"] for one in lines(name)]
        script = official_in_order([one["answer"] for one in answers], [one["label"] for one in lines(name)])
        assert by_name[f"pope_{name}_f1_official"] == pytest.approx(script.f1)
        assert by_name[f"pope_{name}_accuracy_official"] == pytest.approx(script.accuracy)


def test_a_failed_request_is_wrong_or_left_out_by_the_named_policy() -> None:
    items = sample_items(CONFIG)
    rows = rows_of(items, CONFIG, lambda item, _: None if item.group[-5] == "1" else item.references["label"])
    assert values(rows, items)["pope_random_accuracy_official"] == pytest.approx(18 / 24)
    left_out = config_of(Pope, version=None, failed_items="left_out")
    assert values(rows, items, left_out)["pope_random_accuracy_official_answered"] == 1
    assert score(items, rows, left_out, SETTINGS).measurement.failed == {"timeout": 12}


def broken(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SAMPLES / "pope", tmp_path / "pope"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "", "has no record"),
        (lambda text: text.replace('"label"', '"answer"', 1), "record 1 has no 'label'"),
        (lambda text: text + "{", "line 25 is not JSON"),
        (lambda text: text.replace('"yes"', '"no"', 1), "another label than in another file"),
    ],
    ids=["empty", "other version", "cut off", "other label"],
)
def test_a_faulty_file_is_named(change: Any, message: str, tmp_path: Path) -> None:
    file = broken(tmp_path) / "coco_pope_popular.json"
    file.write_text(change(file.read_text()))
    with pytest.raises(ValueError, match=f"coco_pope_popular.json.*{message}|{message}"):
        list(pope.read(file.parent, CONFIG))


def test_a_byte_order_mark_and_more_keys_change_nothing(tmp_path: Path) -> None:
    file = broken(tmp_path) / "coco_pope_random.json"
    records = [json.dumps({**record, "source": "x"}) for record in lines("random")]
    file.write_bytes(b"\xef\xbb\xbf" + "\n".join(records).encode())
    assert [item.id for item in pope.read(file.parent, CONFIG)] == [item.id for item in sample_items(CONFIG)]


def test_files_of_another_version_are_refused() -> None:
    with pytest.raises(ValueError, match="has 24 questions, and version e3e3926 has 2910"):
        sample_items(config_of(Pope))


def test_an_item_whose_image_is_missing_or_damaged_is_named_and_not_skipped(tmp_path: Path) -> None:
    folder = broken(tmp_path)
    (folder / "val2014/COCO_val2014_000000000001.jpg").unlink()
    (folder / "val2014/COCO_val2014_000000000002.jpg").write_bytes(b"no image")
    items = list(pope.read(folder, CONFIG))
    problems = {item.group: item.problem() for item in items}
    assert problems["COCO_val2014_000000000001.jpg"] == "COCO_val2014_000000000001.jpg is missing"
    assert str(problems["COCO_val2014_000000000002.jpg"]).startswith("COCO_val2014_000000000002.jpg: ")
    assert [problem for problem in problems.values() if problem is None] == [None, None]
    assert len(items) == 48
