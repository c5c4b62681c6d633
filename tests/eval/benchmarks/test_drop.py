"""DROP from its official files to numbers and predictions."""

import json
import shutil
from pathlib import Path

import pytest

from tests.eval.benchmarks.sample import SAMPLES, config_of, numbers, rows_of, sample_items
from vila_ops.config.benchmarks import DropQuestions
from vila_ops.eval.benchmark import GenerateRequest, TextPrompt
from vila_ops.eval.benchmarks import drop

CONFIG = config_of(DropQuestions)
REPLIES = {"d1": "5", "d2": "2.5", "d3": "Hale and Moss", "d4": "3 March 1720", "d5": "Mr Reed"}


def test_the_numbers_by_hand() -> None:
    items = sample_items(CONFIG)
    by_name = numbers(rows_of(items, CONFIG, lambda item, _: REPLIES[item.id]), items, CONFIG)
    # "Hale and Moss" is one span for two: F1 1/2 with one of them, 0 for the other. "Mr Reed" is two words for "Reed",
    # which annotators allow: F1 2/3, which the official code rounds to 0.67.
    assert by_name == pytest.approx(
        {
            "drop_3shot_exact_match_official": 3 / 5,
            "drop_3shot_exact_match_corrected": 3 / 5,
            "drop_3shot_f1_official": (1 + 1 + 0.25 + 1 + 0.67) / 5,
            "drop_3shot_f1_corrected": (1 + 1 + 0.25 + 1 + 2 / 3) / 5,
        }
    )


def test_the_prompt_shows_the_first_questions_of_the_train_file_and_a_decimal_is_not_cut() -> None:
    (request, *_) = drop.requests(sample_items(CONFIG), CONFIG, lambda: pytest.fail("no tokenizer is needed"))
    assert isinstance(request, GenerateRequest)
    assert isinstance(request.prompt, TextPrompt)
    hill = "The hill has 3 paths. Ann took the longest, and Bo the shortest, on 2 June 1901."
    assert request.prompt.turns == (
        (
            "user",
            (
                f"{hill} How many paths has the hill?\nAnswer: 3\n\n{hill} Who took the shortest path?\nAnswer: Bo\n\n"
                f"{hill} Who took the longest path?\nAnswer: Ann\n\nIn 1850 the river had 12 mills and 2.5 miles of "
                f"dams. By 1900 only 7 mills were left, owned by the Hale and Moss families. How many mills were lost "
                f"by 1900?\nAnswer:",
            ),
        ),
    )
    assert request.stop == ("\n",)


def test_the_predictions_are_by_query_and_items_of_a_passage_are_one_group() -> None:
    items = sample_items(CONFIG)
    (content,) = drop.official_files(items, rows_of(items, CONFIG, lambda item, _: REPLIES[item.id]), CONFIG).values()
    assert json.loads(content) == REPLIES
    assert [item.group for item in items] == ["river_1"] * 3 + ["town_2"] * 2
    assert [item.slices for item in items] == [("number",), ("number",), ("spans",), ("date",), ("span",)]


def test_faulty_files_and_too_few_shots_are_named(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(SAMPLES / "drop", tmp_path / "drop"))
    with pytest.raises(ValueError, match=r"drop_dataset_train.json has 3 questions; set shots to at most as many"):
        list(drop.read(folder, config_of(DropQuestions, shots=4)))
    file = folder / "drop_dataset_dev.json"
    content = json.loads(file.read_text())
    content["town_2"]["qa_pairs"][0]["answer"] = {}
    file.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"question d4: the keys of an answer are none; give a number, spans or a date"
    ):
        list(drop.read(folder, CONFIG))
    file.write_text(json.dumps({"town_2": {"passage": ""}}))
    with pytest.raises(ValueError, match=r"record 1 has no 'qa_pairs'"):
        list(drop.read(folder, CONFIG))
