"""BIG-Bench Hard from its official files to numbers."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.eval.benchmarks.sample import ROOT, SAMPLES, config_of, numbers, rows_of, sample_items
from vila_ops.config.benchmarks import Bbh
from vila_ops.eval.benchmark import TextPrompt
from vila_ops.eval.benchmarks import bbh

DIRECT = config_of(Bbh)
STEPS = Bbh.model_validate(yaml.safe_load((ROOT / "configs/benchmarks/bbh_chain_of_thought.yaml").read_text()))


def prompts(config: Bbh) -> list[str]:
    texts = []
    for request in bbh.requests(sample_items(config), config, lambda: pytest.fail("no tokenizer is needed")):
        assert isinstance(request.prompt, TextPrompt)
        ((_, (text,)),) = request.prompt.turns
        texts.append(str(text))
    return texts


def test_the_numbers_by_hand() -> None:
    items = sample_items(DIRECT)
    replies = {"count_the_shapes-0": "3", "count_the_shapes-1": "4.", "pick_the_colour-0": "B"}
    by_name = numbers(rows_of(items, DIRECT, lambda item, _: replies[item.id]), items, DIRECT)
    # The harness wants "4" and "(B)". The first task has 1 of 2 right there, the second 0 of 1.
    assert by_name == pytest.approx(
        {
            "bbh_direct_official": 1 / 3,
            "bbh_direct_corrected": 1,
            "bbh_direct_macro_official": (1 / 2 + 0) / 2,
            "bbh_direct_macro_corrected": 1,
        }
    )


def test_the_result_files_are_those_of_open_instruct() -> None:
    items = sample_items(DIRECT)
    rows = rows_of(items, DIRECT, lambda item, _: None if item.id == "count_the_shapes-1" else "(B)\nQ: no")
    files = bbh.official_files(items, rows, DIRECT)
    assert list(files) == ["count_the_shapes.jsonl", "pick_the_colour.jsonl"]
    records = [json.loads(line) for line in files["count_the_shapes.jsonl"].decode().splitlines()]
    (official,) = [json.loads((SAMPLES / "bbh/bbh/count_the_shapes.json").read_text())["examples"]]
    assert [record.pop("prediction") for record in records] == ["(B)\nQ: no", ""]
    assert records == official


def test_a_chain_of_thought_is_another_metric() -> None:
    items = sample_items(STEPS)
    replies = {
        "count_the_shapes-0": "1 and 2 is 3. So the answer is 3.",
        "count_the_shapes-1": "Four.",
        "pick_the_colour-0": "",
    }
    by_name = numbers(rows_of(items, STEPS, lambda item, _: replies[item.id]), items, STEPS)
    assert by_name["bbh_chain_of_thought_official"] == pytest.approx(1 / 3)


def test_the_examples_are_the_official_ones_without_the_notice_and_direct_without_steps() -> None:
    assert prompts(STEPS)[0] == (
        "Count shapes.\n\nQ: I see a square. How many shapes do I see?\nA: Let's think step by step.\n"
        "There is one square. So the answer is 1.\n\nQ: I see two circles and a star. How many shapes do I see?\n"
        "A: Let's think step by step.\nTwo circles and one star are three shapes. So the answer is 3.\n\n"
        "Q: I see a circle and two squares. How many shapes do I see?\nA: Let's think step by step."
    )
    assert prompts(DIRECT)[2] == (
        "Find the colour of a thing.\n\nQ: The cup is green and the mat is red. Which colour has the cup?\nOptions:\n"
        "(A) red\n(B) green\nA: (B)\n\n"
        "Q: The ball is red and the box is blue. Which colour has the box?\nOptions:\n(A) red\n(B) blue\nA:"
    )


def test_faulty_files_are_named(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(SAMPLES / "bbh", tmp_path / "bbh"))
    examples = folder / "cot-prompts/pick_the_colour.txt"
    examples.write_text(examples.read_text().replace("So the answer is", "It is"))
    with pytest.raises(ValueError, match=r'pick_the_colour.txt has an example without "A:" and "So the answer is"'):
        list(bbh.read(folder, DIRECT))
    examples.unlink()
    with pytest.raises(ValueError, match=r"pick_the_colour.txt is missing"):
        list(bbh.read(folder, STEPS))
    (folder / "bbh/count_the_shapes.json").write_text('{"examples": [{"input": "a"}]}')
    with pytest.raises(ValueError, match=r"count_the_shapes.json: record 1 has no 'target'"):
        list(bbh.read(folder, STEPS))
