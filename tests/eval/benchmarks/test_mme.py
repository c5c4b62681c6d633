"""MME from its official files to numbers and result files; the script's rules are tested in metrics/."""

from pathlib import Path

import numpy as np
import pytest

from tests.eval.benchmarks.sample import config_of, copy_of, numbers, rows_of, sample_items
from vila_ops.config.benchmarks import Mme
from vila_ops.eval.benchmark import Item
from vila_ops.eval.benchmarks import mme
from vila_ops.eval.metrics import mme as script

CONFIG = config_of(Mme)


def reply(item: Item, rotation: int) -> str:
    """Right, but for the second image of existence, a "no" of color far from the start, and all of cognition."""
    subtask, image, _ = item.id.split("/")
    if subtask in script.COGNITION:
        return "No."
    if subtask == "existence" and image == "0001.jpg":
        return "Yes, it is\n\tthere."
    if subtask == "color" and image == "0000.jpg" and item.answer == "No":
        return "It is: no"
    return item.answer


def test_the_numbers_by_hand() -> None:
    items = sample_items(CONFIG)
    by_name = numbers(rows_of(items, CONFIG, reply), items, CONFIG)
    # Three of four right and one of two images in full: 75 + 50. Half right and no image in full: 50.
    assert by_name["mme_existence_official"] == by_name["mme_existence_corrected"] == 125
    assert by_name["mme_color_official"] == 125
    assert by_name["mme_color_corrected"] == 200
    assert by_name["mme_perception_official"] == pytest.approx(8 * 200 + 2 * 125)
    assert by_name["mme_perception_corrected"] == pytest.approx(9 * 200 + 125)
    assert by_name["mme_cognition_official"] == by_name["mme_cognition_corrected"] == pytest.approx(4 * 50)


def test_the_result_files_have_four_cells_a_line_and_give_the_official_numbers() -> None:
    items = sample_items(CONFIG)
    rows = rows_of(items, CONFIG, reply)
    files = mme.official_files(items, rows, CONFIG)
    assert sorted(files) == sorted(f"{name}.txt" for name in (*script.PERCEPTION, *script.COGNITION))
    read = []
    for name, content in files.items():
        for line in content.decode().splitlines():
            image, question, truth, answer = line.split("\t")
            assert question.endswith(" Please answer yes or no.")
            assert truth in ("Yes", "No")
            read.append(script.MmeItem(name[:-4], image, "yes" if truth == "Yes" else "no", answer))
    official, by_name = script.mme(read), numbers(rows, items, CONFIG)
    assert official.perception is not None
    assert by_name["mme_perception_official"] == pytest.approx(official.perception.official)
    for name, one in official.subtasks.items():
        assert by_name[f"mme_{name}_official"] == pytest.approx(one.score.official)


def test_the_prompt_leaves_the_official_end_of_the_question_out() -> None:
    (item, *_) = sample_items(CONFIG)
    assert item.parts["question"] == ("Is there a circle in this image?",)
    assert item.parts["official_question"] == ("Is there a circle in this image? Please answer yes or no.",)


def test_an_image_with_one_answer_counts_not_where_failed_items_are_left_out() -> None:
    config = config_of(Mme, failed_items="left_out")
    items = sample_items(config)
    rows = rows_of(items, config, lambda item, _: None if item.id == "count/0000.jpg/1" else item.answer)
    assert numbers(rows, items, config)["mme_perception_official_answered"] == 2000
    assert numbers(rows, items, CONFIG)["mme_count_official"] == 75 + 50


def test_without_a_subtask_there_is_no_sum() -> None:
    items = sample_items(CONFIG)[:8]  # existence and count
    names = numbers(rows_of(items, CONFIG, reply), items, CONFIG)
    assert sorted(names) == [
        f"mme_{name}_{column}" for name in ("count", "existence") for column in ("corrected", "official")
    ]


def test_a_resample_without_a_subtask_takes_the_mean_of_the_others() -> None:
    two = mme.SumOfScores(2)
    assert two(np.array([[1.5, 1, 2, 2, 2, 2], [1.5, 1, 2, 0, 0, 0]])).tolist() == [75 + 50 + 200, 2 * (75 + 50)]


ROOT = "MME_Benchmark_release_version"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Is it?\tYes\n", "has 1 lines, not two"),
        ("Is it?\tYes\nIs it? No\n", "has 2 lines, not two of a question, a tab and Yes or No"),
        ("Is it?\tYes\nIs it not?\tMaybe\n", "'Maybe' is neither Yes nor No"),
    ],
)
def test_a_faulty_file_is_named(content: str, message: str, tmp_path: Path) -> None:
    folder = copy_of("mme", tmp_path)
    (folder / ROOT / "count/0001.txt").write_text(content)
    with pytest.raises(ValueError, match=f"count/0001.txt.*{message}"):
        list(mme.read(folder, CONFIG))


def test_a_missing_subtask_is_named_and_a_folder_more_is_read(tmp_path: Path) -> None:
    folder = copy_of("mme", tmp_path)
    (folder / ROOT).rename(folder / "inner")
    (folder / ROOT).mkdir()
    (folder / "inner").rename(folder / ROOT / "MME_Benchmark")
    assert [item.id for item in mme.read(folder, CONFIG)] == [item.id for item in sample_items(CONFIG)]
    (folder / ROOT / "MME_Benchmark/landmark").rename(folder / "away")
    with pytest.raises(ValueError, match="landmark has no questions"):
        list(mme.read(folder, CONFIG))
