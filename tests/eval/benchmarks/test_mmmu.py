"""MMMU from its official files to numbers and result files."""

import json
import random
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.eval.benchmarks.sample import SAMPLES, config_of, numbers, rows_of, sample_items
from vila_ops.config.benchmarks import Mmmu
from vila_ops.data.records import Image
from vila_ops.eval.benchmark import TextPrompt
from vila_ops.eval.benchmarks import mmmu

CONFIG = config_of(Mmmu)
REPLIES = {
    "validation_Art_1": "I do not know",
    "validation_Art_2": "(A)",
    "validation_Art_3": "?",
    "validation_Math_1": "three",
    "validation_Math_2": "The area is 205.92",
    "validation_Math_3": "a disc",
}
"""The first, third and fourth have no letter: the official code draws one of 4, 2 and 2.

"three" is the text of the right option, which the corrected column reads.
"""


def test_the_official_column_draws_in_the_order_of_the_files() -> None:
    items = sample_items(CONFIG)
    rows = rows_of(items, CONFIG, lambda item, _: REPLIES[item.id])
    random.seed(42)  # as the official module does
    drawn = [random.choice(["A", "B", "C", "D"]), random.choice(["A", "B"]), random.choice(["A", "B"])]
    right = [letter == truth for letter, truth in zip(drawn, "ABA", strict=True)]
    assert 0 < sum(right) < 3, "so that another order would give another number"
    expected = {"mmmu_validation_official": (sum(right) + 3) / 6, "mmmu_validation_corrected": 4 / 6}
    assert numbers(rows, items, CONFIG) == pytest.approx(expected)
    assert numbers(rows[::-1], items, CONFIG) == pytest.approx(expected), "the order of the rows does not matter"
    scores = mmmu.score(items[::-1], rows, CONFIG)
    assert [one["official"] for one in scores] != [one["official"] for one in mmmu.score(items, rows, CONFIG)]


def test_a_failed_question_is_wrong_and_draws_nothing() -> None:
    items = sample_items(CONFIG)
    rows = rows_of(items, CONFIG, lambda item, _: None if item.id == "validation_Art_1" else REPLIES[item.id])
    random.seed(42)
    drawn = [random.choice(["A", "B"]), random.choice(["A", "B"])]
    right = sum(letter == truth for letter, truth in zip(drawn, "BA", strict=True))
    assert numbers(rows, items, CONFIG)["mmmu_validation_official"] == pytest.approx((right + 3) / 6)


def test_images_stand_where_the_question_names_them() -> None:
    items = {item.id: item for item in sample_items(CONFIG)}
    prompts = {}
    for request in mmmu.requests(list(items.values()), CONFIG, lambda: pytest.fail("no tokenizer is needed")):
        assert isinstance(request.prompt, TextPrompt)
        ((_, parts),) = request.prompt.turns
        prompts[request.item] = "".join("[image]" if isinstance(part, Image) else str(part) for part in parts)
    assert prompts["validation_Art_2"] == (
        "Compare [image] with [image]. What changed in <image 2>?\n(A) the form and the colour\n(B) only the colour\n"
        "(C) only the frame\n\nAnswer with the option's letter from the given choices directly."
    )
    assert prompts["validation_Art_3"].startswith("[image][image]\nWhich one follows [image]?\n(A) <image 2>\n")
    assert prompts["validation_Math_3"] == (
        "[image] Name the shape.\n\nAnswer the question using a single word or phrase."
    )
    assert items["validation_Math_3"].references == {"answer": ["circle", "disc"], "type": "open"}


def test_the_result_files_are_those_of_the_official_script() -> None:
    items = sample_items(CONFIG)
    files = mmmu.official_files(items, rows_of(items, CONFIG, lambda item, _: REPLIES[item.id]), CONFIG)
    assert list(files) == ["Art/output.json", "Math/output.json"]
    first, second, _ = json.loads(files["Math/output.json"])
    assert first == {
        "id": "validation_Math_1",
        "question_type": "multiple-choice",
        "answer": "A",
        "all_choices": ["A", "B"],
        "index2ans": {"A": "three", "B": "four"},
        "response": "three",
    }
    assert second == {
        "id": "validation_Math_2",
        "question_type": "open",
        "answer": ["205.92"],
        "response": "The area is 205.92",
    }


def test_missing_images_and_faulty_files_are_named(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(SAMPLES / "mmmu", tmp_path / "mmmu"))
    file = folder / "Art/validation-00000-of-00001.parquet"
    rows = pq.read_table(file).to_pylist()

    def problem(**changes: object) -> str | None:
        pq.write_table(pa.Table.from_pylist([{**rows[0], **changes}]), file)
        return next(iter(mmmu.read(folder, CONFIG))).problem()

    assert problem(image_1=None) == "validation_Art_1 has no image_1"
    assert str(problem(image_1={"bytes": b"no image"})).startswith("validation_Art_1 image_1: ")
    with pytest.raises(ValueError, match=r"question validation_Art_1 has .* in place of a list"):
        problem(options="'a', 'b")
    with pytest.raises(ValueError, match="question validation_Art_1 has the type 'open' and 4 options"):
        problem(question_type="open")
    file.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="is no parquet file"):
        list(mmmu.read(folder, CONFIG))
    with pytest.raises(ValueError, match=r"has no SUBJECT/dev-\*.parquet"):
        list(mmmu.read(folder, config_of(Mmmu, split="dev")))
