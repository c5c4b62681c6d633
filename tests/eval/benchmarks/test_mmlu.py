"""MMLU from its official files to numbers and result files."""

import csv
import io
import math
import shutil
from pathlib import Path

import pytest

from tests.eval.benchmarks.sample import SAMPLES, config_of, numbers, rows_of, sample_items
from vila_ops.config.benchmarks import Mmlu
from vila_ops.eval.benchmark import Item, ScoreRequest, TextPrompt
from vila_ops.eval.benchmarks import mmlu
from vila_ops.eval.rows import ItemRow, Response
from vila_ops.eval.runner import row_of
from vila_ops.eval.scoring import scored_rows

CONFIG = config_of(Mmlu, shots=2)
LIKELIEST = {"plane_shapes-0": "A", "plane_shapes-1": "AC", "plane_shapes-2": "A", "primary_colours-0": "AB"}
"""The letters that share the highest likelihood."""


def no_tokenizer() -> None:
    raise AssertionError("running text is written without a tokenizer")


def likelihood_rows(items: list[Item]) -> list[ItemRow]:
    rows = []
    for item, request in zip(items, mmlu.requests(items, CONFIG, no_tokenizer), strict=True):  # type: ignore[arg-type]
        nats = tuple(1.0 if letter in LIKELIEST[item.id] else 2.0 for letter in "ABCD")
        rows.append(row_of(item, request, Response(answer=LIKELIEST[item.id][0], nats=nats, tokens=(1,) * 4)))
    return rows


def test_the_numbers_by_hand() -> None:
    items = sample_items(CONFIG)
    # Truths A, C, D and A. The first of equal letters: right, wrong, wrong; right. Shared: 1, 1/2, 0; 1/2.
    assert numbers(likelihood_rows(items), items, CONFIG) == pytest.approx(
        {
            "mmlu_2shot_official": 2 / 4,
            "mmlu_2shot_corrected": 2 / 4,
            "mmlu_2shot_macro_official": (1 / 3 + 1) / 2,
            "mmlu_2shot_macro_corrected": (1.5 / 3 + 0.5) / 2,
        }
    )


def test_the_prompt_is_the_official_one() -> None:
    (request, *_) = mmlu.requests(sample_items(CONFIG), CONFIG, no_tokenizer)  # type: ignore[arg-type]
    assert isinstance(request, ScoreRequest)
    assert isinstance(request.prompt, TextPrompt)
    assert request.prompt.turns == (
        (
            "user",
            (
                "The following are multiple choice questions (with answers) about  plane shapes.\n\n"
                "How many sides has a square?\nA. 3\nB. 4\nC. 5\nD. 6\nAnswer: B\n\n"
                "Which shape has no corner?\nA. a circle\nB. a square\nC. a kite\nD. a star\nAnswer: A\n\n"
                "How many sides has a triangle?\nA. 3\nB. 4\nC. 5\nD. 6\nAnswer:",
            ),
        ),
    )
    assert request.continuations == (" A", " B", " C", " D")


def test_generated_letters_are_another_metric() -> None:
    generate = {**CONFIG.prompt.model_dump(), "answer": {"kind": "generate", "max_new_tokens": 4}}
    config = config_of(Mmlu, shots=2, prompt=generate)
    items = sample_items(config)
    replies = {"plane_shapes-0": "A. 3", "plane_shapes-1": "It is (C)", "plane_shapes-2": None}
    by_name = numbers(rows_of(items, config, lambda item, _: replies.get(item.id, "")), items, config)
    assert by_name["mmlu_2shot_generated_official"] == pytest.approx(1 / 4)
    assert by_name["mmlu_2shot_generated_corrected"] == pytest.approx(2 / 4)


def test_the_result_files_are_those_of_the_official_script() -> None:
    items = sample_items(CONFIG)
    files = mmlu.official_files(items, scored_rows(items, likelihood_rows(items), CONFIG), CONFIG)
    assert list(files) == ["plane_shapes.csv", "primary_colours.csv"]
    header, first, *_ = list(csv.reader(io.StringIO(files["plane_shapes.csv"].decode())))
    assert header[:8] == ["0", "1", "2", "3", "4", "5", "vila-ops_correct", "vila-ops_choiceA_probs"]
    assert first[:7] == ["How many sides has a triangle?", "3", "4", "5", "6", "A", "True"]
    a, b, *_ = map(float, first[7:])
    assert math.log(a / b) == pytest.approx(1)


def test_a_faulty_row_and_too_few_shots_are_named(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(SAMPLES / "mmlu", tmp_path / "mmlu"))
    with pytest.raises(ValueError, match=r"plane_shapes_dev.csv has 2 questions; set shots to at most as many"):
        list(mmlu.read(folder, config_of(Mmlu)))
    file = folder / "test/plane_shapes_test.csv"
    text = file.read_text()
    file.write_text(text.replace(",A\n", ",A,easy\n"))
    with pytest.raises(ValueError, match=r"plane_shapes_test.csv: row 1 has 7 columns and ends in \['easy'\]"):
        list(mmlu.read(folder, CONFIG))
    file.write_text("\ufeff" + text, encoding="utf-8")
    assert next(mmlu.read(folder, CONFIG)).parts["question"] == ("How many sides has a triangle?",)
