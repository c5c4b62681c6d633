"""SEED-Bench from its official files to numbers and upload file."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.eval.benchmarks.sample import SAMPLES, config_of, numbers, rows_of, sample_items
from vila_ops.config.benchmarks import SeedBench
from vila_ops.eval.benchmarks import seed_bench

IMAGE, TOTAL = config_of(SeedBench), config_of(SeedBench, subset="total")
REPLIES = {
    "101669": "A",
    "101670": "B. red",
    "101671": "The answer is C",
    "101672": "",
    "9001": "b",
    "9002": "C",
}


def test_the_numbers_by_hand_and_image_and_total_are_different_metrics() -> None:
    items = sample_items(TOTAL)
    by_name = numbers(rows_of(items, TOTAL, lambda item, _: REPLIES[item.id]), items, TOTAL)
    # Exactly the letter: A and C. The first character: also "B. red" and "b". Corrected: also "The answer is C".
    assert by_name == pytest.approx(
        {
            "seed_bench_image_official": 1 / 4,
            "seed_bench_image_first_letter": 2 / 4,
            "seed_bench_image_corrected": 3 / 4,
            "seed_bench_video_official": 1 / 2,
            "seed_bench_video_first_letter": 2 / 2,
            "seed_bench_video_corrected": 2 / 2,
            "seed_bench_total_official": 2 / 6,
            "seed_bench_total_first_letter": 4 / 6,
            "seed_bench_total_corrected": 5 / 6,
        }
    )
    items = sample_items(IMAGE)
    of_images = numbers(rows_of(items, IMAGE, lambda item, _: REPLIES[item.id]), items, IMAGE)
    assert of_images == {name: value for name, value in by_name.items() if name.startswith("seed_bench_image")}


def test_the_upload_has_every_question_and_gives_the_number_of_llavas_script() -> None:
    items = sample_items(TOTAL)
    rows = rows_of(items, TOTAL, lambda item, _: REPLIES[item.id])
    (file,) = seed_bench.official_files(items, rows, TOTAL).values()
    uploaded = {one["question_id"]: one["prediction"] for one in map(json.loads, file.decode().splitlines())}
    questions = json.loads((SAMPLES / "seed_bench/SEED-Bench.json").read_text())["questions"]
    assert list(uploaded) == [one["question_id"] for one in questions]
    right = [uploaded[one["question_id"]] == one["answer"] for one in questions]
    assert numbers(rows, items, TOTAL)["seed_bench_total_official"] == pytest.approx(sum(right) / len(right))


def test_a_video_without_its_frame_is_named_and_the_images_do_not_need_it(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(SAMPLES / "seed_bench", tmp_path / "seed_bench"))
    shutil.rmtree(folder / "SEED-Bench-video-image")
    problems = [item.problem() for item in seed_bench.read(folder, TOTAL)]
    assert problems == [None] * 4 + ["10_9001.png is missing", "12_9002.png is missing"]
    assert [item.problem() for item in seed_bench.read(folder, IMAGE)] == [None] * 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "has no questions and question_type"),
        ({"questions": [], "question_type": {}}, "has no record"),
        ({"questions": [{"question_id": "1"}], "question_type": {}}, "record 1 has no 'question'"),
    ],
)
def test_a_file_of_another_version_is_named(content: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "SEED-Bench.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"SEED-Bench.json.*{message}"):
        list(seed_bench.read(tmp_path, IMAGE))
