"""AI2D from its official files to numbers."""

import base64
import shutil
from pathlib import Path

import pytest

from tests.eval.benchmarks.sample import SAMPLES, cells, config_of, numbers, rows_of, sample_items
from vila_ops.config.benchmarks import Ai2d
from vila_ops.data.records import Image
from vila_ops.eval.benchmarks import ai2d

CONFIG = config_of(Ai2d)
REPLIES = {"0": "B", "1": "", "2": "There are four links", "3": "b"}
"""VLMEvalKit reads a letter, or the only option that is named, but no "b"."""


def test_the_numbers_by_hand() -> None:
    items = sample_items(CONFIG)
    by_name = numbers(rows_of(items, CONFIG, lambda item, _: REPLIES[item.id]), items, CONFIG)
    assert by_name == pytest.approx({"ai2d_masked_official": 2 / 4, "ai2d_masked_corrected": 3 / 4})


def test_the_result_is_the_table_of_vlmevalkit() -> None:
    items = sample_items(CONFIG)
    rows = rows_of(items, CONFIG, lambda item, _: None if item.id == "1" else REPLIES[item.id])
    ((name, content),) = ai2d.official_files(items, rows, CONFIG).items()
    header, *table = cells(content)
    assert name == "AI2D_TEST.xlsx"
    assert header == ["index", "question", "A", "B", "C", "D", "answer", "prediction"]
    assert [row[0] for row in table] == ["0", "1", "2", "3"]
    assert [row[6] for row in table] == [item.answer for item in items]
    assert [row[7] for row in table] == ["B", "", "There are four links", "b"]
    assert table[1][5] == ""


def test_options_end_at_the_first_empty_one_and_rows_of_one_image_are_one_group() -> None:
    items = sample_items(CONFIG)
    assert [len(item.options) for item in items] == [4, 3, 4, 4]
    assert [item.group for item in items] == ["0", "1", "0", "1"]
    assert items[0].parts["image"] == items[2].parts["image"]


def test_the_other_file_is_another_metric_with_other_images() -> None:
    shown = config_of(Ai2d, labels="shown")
    items = sample_items(shown)
    assert items[0].parts["image"] != sample_items(CONFIG)[0].parts["image"]
    assert "ai2d_shown_official" in numbers(rows_of(items, shown, lambda item, _: "A"), items, shown)


def changed(tmp_path: Path, before: str, after: str) -> Path:
    folder = Path(shutil.copytree(SAMPLES / "ai2d", tmp_path / "ai2d"))
    file = folder / "AI2D_TEST.tsv"
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after, 1))
    return folder


def test_a_broken_image_is_named_for_every_row_that_has_it(tmp_path: Path) -> None:
    (image,) = sample_items(CONFIG)[0].parts["image"]
    assert isinstance(image, Image)
    encoded = base64.b64encode(image.data).decode()
    not_base64 = changed(tmp_path / "a", encoded, f"{encoded[:90]}*{encoded[90:]}")
    problems = [item.problem() for item in ai2d.read(not_base64, CONFIG)]
    assert [problem is None for problem in problems] == [False, True, False, True]
    assert str(problems[2]).startswith("image of row 0: not base64: ")
    no_image = changed(tmp_path / "b", encoded, base64.b64encode(b"no image" * 20).decode())
    assert str(next(ai2d.read(no_image, CONFIG)).problem()).startswith("image of row 0: ")
    no_row = changed(tmp_path / "c", "food chains\t0", "food chains\t9")
    assert list(ai2d.read(no_row, CONFIG))[2].problem() is not None


def test_an_answer_without_option_and_a_missing_column_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"AI2D_TEST.tsv: row 1 has the answer 'D', which is none of its options"):
        list(ai2d.read(changed(tmp_path / "a", "\tA\tplants", "\tD\tplants"), CONFIG))
    with pytest.raises(ValueError, match=r"AI2D_TEST.tsv: record 1 has no 'question'"):
        list(ai2d.read(changed(tmp_path / "b", "\tquestion\t", "\tasked\t"), CONFIG))
