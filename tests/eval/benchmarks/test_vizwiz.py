"""VizWiz from its official files to numbers and uploads; the official code's rules are tested in metrics/."""

import json
from pathlib import Path

import pytest

from tests.eval.benchmarks.sample import config_of, copy_of, numbers, rows_of, sample_items
from vila_ops.config.benchmarks import VizWiz
from vila_ops.eval.benchmarks import vizwiz
from vila_ops.eval.metrics.vizwiz import unanswerability

CONFIG = config_of(VizWiz)


def values(*answers: str) -> dict[str, float]:
    items = sample_items(CONFIG)
    by_id = dict(zip([item.id for item in items], answers, strict=True))
    return numbers(rows_of(items, CONFIG, lambda item, _: by_id[item.id]), items, CONFIG)


def test_the_numbers_by_hand() -> None:
    by_name = values("red beans", "Unanswerable", "no", "2 pills.")
    # Six and eight people agree with the first two, one with "no" (0.3). Five say "2 pills.", which the official code
    # compares with "2 pills".
    assert by_name["vizwiz_official"] == pytest.approx((1 + 1 + 0.3 + 0) / 4)
    assert by_name["vizwiz_corrected"] == pytest.approx((1 + 1 + 0.3 + 1) / 4)
    assert by_name["vizwiz_unanswerable_f1"] == 1
    assert by_name["vizwiz_unanswerable_average_precision"] == 1


@pytest.mark.parametrize("said", [(True, True, False, False), (False, False, False, False), (True, False, True, False)])
def test_recognition_of_what_cannot_be_answered_is_that_of_the_official_code(said: tuple[bool, ...]) -> None:
    by_name = values(*("unanswerable" if one else "blue" for one in said))
    expected = unanswerability([True, False, True, True], [0.0 if one else 1.0 for one in said])
    assert by_name["vizwiz_unanswerable_f1"] == pytest.approx(expected.f1)
    assert by_name["vizwiz_unanswerable_average_precision"] == pytest.approx(expected.average_precision)


def test_the_results_of_val_are_the_answers_and_those_of_test_are_normalised() -> None:
    items = sample_items(CONFIG)
    rows = rows_of(items, CONFIG, lambda *_: "A Dog.")
    (val,) = vizwiz.official_files(items, rows, CONFIG).values()
    assert json.loads(val) == [{"image": f"VizWiz_val_{n:08d}.jpg", "answer": "A Dog."} for n in range(4)]
    config = config_of(VizWiz, split="test")
    items = sample_items(config)
    rows = rows_of(items, config, lambda *_: "A Dog.")
    assert numbers(rows, items, config) == {}
    (test,) = vizwiz.official_files(items, rows, config).values()
    assert json.loads(test) == [{"image": f"VizWiz_test_{n:08d}.jpg", "answer": "dog"} for n in range(2)]


def test_the_file_of_another_split_is_refused(tmp_path: Path) -> None:
    folder = copy_of("vizwiz", tmp_path)
    (folder / "test.json").write_bytes((folder / "val.json").read_bytes())
    with pytest.raises(ValueError, match=r"VizWiz_val_00000000\.jpg, which is of another split"):
        list(vizwiz.read(folder, config_of(VizWiz, split="test")))
    (folder / "val.json").write_text('[{"image": "VizWiz_val_00000000.jpg", "question": "x"}]')
    with pytest.raises(ValueError, match=r"val.json: record 1 has no 'answers'"):
        list(vizwiz.read(folder, CONFIG))
