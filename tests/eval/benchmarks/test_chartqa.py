"""ChartQA from its official files to numbers."""

import json
import shutil
from pathlib import Path

import pytest

from tests.eval.benchmarks.sample import SAMPLES, config_of, numbers, rows_of, sample_items, slices
from vila_ops.config.benchmarks import ChartQa
from vila_ops.eval.benchmarks import chartqa

CONFIG = config_of(ChartQa)
REPLIES = {
    "human-0": "29",  # within 5 % of 30
    "human-1": "",
    "human-2": "2008",  # near 2010, but a year
    "augmented-0": "33.3",  # "33.3%" without its sign
    "augmented-1": "5",  # 25 % away from 4
    "augmented-2": "yes",
}


def test_the_numbers_by_hand() -> None:
    items = sample_items(CONFIG)
    rows = rows_of(items, CONFIG, lambda item, _: REPLIES[item.id])
    assert numbers(rows, items, CONFIG) == pytest.approx({"chartqa_official": 3 / 6, "chartqa_corrected": 3 / 6})
    by_slice = slices(rows, items, CONFIG)
    assert by_slice["chartqa_official", "human"] == pytest.approx(2 / 3)
    assert by_slice["chartqa_corrected", "human"] == pytest.approx(1 / 3)
    assert by_slice["chartqa_official", "augmented"] == pytest.approx(1 / 3)
    assert by_slice["chartqa_corrected", "augmented"] == pytest.approx(2 / 3)


def test_the_result_files_are_the_official_ones_with_predictions() -> None:
    items = sample_items(CONFIG)
    files = chartqa.official_files(items, rows_of(items, CONFIG, lambda item, _: REPLIES[item.id] or None), CONFIG)
    for part in ("human", "augmented"):
        records = json.loads(files[f"test_{part}.json"])
        predictions = [REPLIES[f"{part}-{place}"] for place in range(3)]
        assert [record.pop("prediction") for record in records] == predictions
        assert records == json.loads((SAMPLES / f"chartqa/test/test_{part}.json").read_text())


def test_a_failed_question_is_wrong_or_left_out() -> None:
    items = sample_items(CONFIG)
    rows = rows_of(items, CONFIG, lambda item, _: None if item.id == "human-1" else item.references)
    assert numbers(rows, items, CONFIG)["chartqa_official"] == pytest.approx(5 / 6)
    left_out = config_of(ChartQa, failed_items="left_out")
    assert numbers(rows, items, left_out)["chartqa_official_answered"] == 1


def test_a_missing_file_and_a_missing_image_are_named(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(SAMPLES / "chartqa", tmp_path / "chartqa"))
    (folder / "test/png/bars_2.png").unlink()
    assert [item.problem() for item in chartqa.read(folder, CONFIG)].count("bars_2.png is missing") == 3
    (folder / "test/test_augmented.json").unlink()
    with pytest.raises(ValueError, match=r"test_augmented.json is missing; `vila-ops benchmark list`"):
        list(chartqa.read(folder, CONFIG))
