"""ScienceQA from its official files to numbers and results; the script's rules are tested in metrics/."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.eval.benchmarks.sample import config_of, copy_of, numbers, rows_of, sample_items
from vila_ops.config.benchmarks import ScienceQa
from vila_ops.eval.benchmark import TextPrompt
from vila_ops.eval.benchmarks import scienceqa

CONFIG, ALL = config_of(ScienceQa), config_of(ScienceQa, subset="all")
ANSWERS: dict[str, str | None] = {"2": "B", "3": "The answer is A.", "4": "(A)", "5": "triangle"}


def values(config: ScienceQa, answers: dict[str, str | None]) -> dict[str, float]:
    items = sample_items(config)
    return numbers(rows_of(items, config, lambda item, _: answers[item.id]), items, config)


def test_the_numbers_by_hand() -> None:
    # The script reads "B" and "The answer is A.", and neither "(A)" nor the text of an option. 3 has no image.
    image = {"scienceqa_image_official": pytest.approx(1 / 3), "scienceqa_image_corrected": 1}
    assert values(CONFIG, ANSWERS) == image
    assert values(ALL, ANSWERS) == {"scienceqa_official": 2 / 4, "scienceqa_corrected": 1, **image}


def test_a_question_without_an_answer_leaves_the_official_subset_of_images_and_no_other() -> None:
    by_name = values(ALL, {**ANSWERS, "2": None})
    assert by_name["scienceqa_image_official"] == 0 / 2
    assert by_name["scienceqa_image_corrected"] == pytest.approx(2 / 3)
    assert by_name["scienceqa_official"] == 1 / 4


def test_the_prompt_has_context_question_and_options() -> None:
    (first, *_, without_image, _, _) = [
        request.prompt
        for request in scienceqa.requests(sample_items(ALL), ALL, lambda: None)  # type: ignore[arg-type, return-value]
    ]
    assert isinstance(first, TextPrompt)
    assert isinstance(without_image, TextPrompt)
    hint = "Answer with the option's letter from the given choices directly."
    question = "Question: Which color has the disc?\nOptions: (A) blue (B) red (C) green"
    assert first.turns[0][1][1:] == (f"\nContext: Look at the disc.\n{question}\n{hint}",)
    question = "Question: Which of these is a liquid?\nOptions: (A) water (B) sand"
    assert without_image.turns[0][1] == (f"Context: N/A\n{question}\n{hint}",)


def test_the_results_are_those_of_the_script() -> None:
    items = sample_items(ALL)
    rows = rows_of(items, ALL, lambda item, _: {**ANSWERS, "3": None}[item.id])
    assert json.loads(scienceqa.official_files(items, rows, ALL)["test_results.json"]) == {
        "acc": 25,
        "correct": 1,
        "count": 4,
        "results": {"2": 1, "3": -1, "4": -1, "5": -1},
        "outputs": {"2": "B", "3": "FAILED", "4": "(A)", "5": "triangle"},
    }


@pytest.mark.parametrize(
    ("name", "own", "message"),
    [
        ("problems.json", lambda content: content.pop("4"), "has no problem 4 of the split"),
        ("problems.json", lambda content: content["4"].update(answer=2), "problem 4 has 2 choices and answer 2"),
        ("problems.json", lambda content: content["4"].pop("hint"), "record 3 has no 'hint'"),
        ("pid_splits.json", lambda content: content.pop("test"), "record 1 has no 'test'"),
    ],
)
def test_a_faulty_file_is_named(name: str, own: Any, message: str, tmp_path: Path) -> None:
    folder = copy_of("scienceqa", tmp_path)
    content = json.loads((folder / name).read_text())
    own(content)
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        list(scienceqa.read(folder, CONFIG))
