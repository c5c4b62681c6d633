"""TextVQA from its official files to the numbers of both variants; the evaluator's rules are tested in metrics/."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.eval.benchmarks.sample import ROOT, config_of, copy_of, numbers, rows_of, sample_items
from vila_ops.config.benchmarks import TextVqa
from vila_ops.eval.benchmark import Item, TextPrompt
from vila_ops.eval.benchmarks import textvqa

CONFIG = config_of(TextVqa)
WITHOUT = TextVqa.model_validate(yaml.safe_load((ROOT / "configs/benchmarks/textvqa_without_ocr.yaml").read_text()))
ANSWERS = {"101": "Stop", "102": "the red one", "103": "forty two", "104": "none"}
QUESTIONS, TOKENS = "TextVQA_0.5.1_val.json", "TextVQA_Rosetta_OCR_v0.2_val.json"


def reply(item: Item, rotation: int) -> str:
    return ANSWERS[item.id]


def texts(config: TextVqa) -> list[Any]:
    prompts = [request.prompt for request in textvqa.requests(sample_items(config), config, lambda: None)]  # type: ignore[arg-type, return-value]
    return [prompt.turns[0][1][1] for prompt in prompts if isinstance(prompt, TextPrompt)]


@pytest.mark.parametrize(("config", "name"), [(CONFIG, "textvqa_ocr"), (WITHOUT, "textvqa_without_ocr")])
def test_the_numbers_by_hand_under_the_name_of_the_variant(config: TextVqa, name: str) -> None:
    items = sample_items(config)
    # Eight of ten, none, three (0.9); "none" is "0" on both sides, which one person says (0.3).
    expected = pytest.approx((1 + 0 + 0.9 + 0.3) / 4)
    assert numbers(rows_of(items, config, reply), items, config) == {
        f"{name}_official": expected,
        f"{name}_corrected": expected,
    }


def test_the_prompt_has_the_ocr_tokens_where_there_are_any() -> None:
    hint = "Answer the question using a single word or phrase."
    with_tokens = texts(CONFIG)
    assert with_tokens[2] == f"\nwhat number is shown?\nReference OCR token: 42, No.\n{hint}"
    assert with_tokens[3] == f"\nis there any text?\n{hint}"
    assert texts(WITHOUT)[2] == f"\nwhat number is shown?\n{hint}"


def test_without_the_file_of_tokens_only_the_variant_without_them_is_asked(tmp_path: Path) -> None:
    folder = copy_of("textvqa", tmp_path)
    (folder / TOKENS).unlink()
    items = list(textvqa.read(folder, CONFIG))
    assert len(rows_of(items, WITHOUT, reply)) == 4
    with pytest.raises(ValueError, match=r"the prompt names {ocr}, but item '101' has"):
        rows_of(items, CONFIG, reply)


def test_the_results_are_the_answers_by_id() -> None:
    items = sample_items(CONFIG)
    (content,) = textvqa.official_files(items, rows_of(items, CONFIG, reply), CONFIG).values()
    assert json.loads(content) == [{"question_id": int(id_), "answer": answer} for id_, answer in ANSWERS.items()]


@pytest.mark.parametrize(
    ("name", "own", "message"),
    [
        (QUESTIONS, lambda content: content["data"][0]["answers"].pop(), "question 101 has 9 answers, not ten"),
        (QUESTIONS, lambda content: content.update(dataset_type="train"), "has the split train"),
        (QUESTIONS, lambda content: content["data"][0].pop("answers"), "record 1 has no 'answers'"),
        (TOKENS, lambda content: content["data"].pop(1), "has no tokens of image b1b2c3d4e5f60719"),
    ],
)
def test_a_faulty_file_is_named(name: str, own: Any, message: str, tmp_path: Path) -> None:
    folder = copy_of("textvqa", tmp_path)
    content = json.loads((folder / name).read_text())
    own(content)
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        list(textvqa.read(folder, CONFIG))
