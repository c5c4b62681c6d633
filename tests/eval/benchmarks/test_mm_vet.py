"""MM-Vet from its official files to answers, and with a judge to numbers; the judge is a real HTTP server."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.eval.benchmarks.sample import SAMPLES, config_of, rows_of, sample_items
from tests.eval.stub_endpoint import Server, completion
from vila_ops.artifacts.kinds import Pretrained
from vila_ops.config import OfficialSuite, Run
from vila_ops.config.benchmarks import MmVet
from vila_ops.eval.benchmarks import mm_vet
from vila_ops.eval.evaluate import evaluate, rescore
from vila_ops.eval.metrics.judged import grade
from vila_ops.eval.report import read_report

JUDGE = {"model": "judge", "temperature": 0, "max_new_tokens": 3}
PLAIN = config_of(MmVet)
GRADES = {"shape": "0.5", "three": "1.0", "left": "It depends", "written": "0.0"}


def with_judge(server: Server) -> MmVet:
    server.answer = lambda text, tries: completion(
        next(reply for word, reply in GRADES.items() if word in text.splitlines()[-1])
    )
    short = {**PLAIN.prompt.model_dump(), "answer": {"kind": "generate", "max_new_tokens": 4}}
    return config_of(MmVet, prompt=short, judge={**JUDGE, "url": server.url})


def test_the_results_file_is_that_of_the_notebook_and_needs_no_judge() -> None:
    items = sample_items(PLAIN)
    rows = rows_of(items, PLAIN, lambda item, _: None if item.id == "v1_2" else f"It is {item.id}.")
    (content,) = mm_vet.official_files(items, rows, PLAIN).values()
    assert json.loads(content) == {"v1_0": "It is v1_0.", "v1_1": "It is v1_1.", "v1_2": "", "v1_3": "It is v1_3."}


def test_slices_are_capabilities_and_their_combinations() -> None:
    assert [item.slices for item in sample_items(PLAIN)] == [
        ("rec",),
        ("math", "ocr", "math+ocr"),
        ("rec", "spat", "rec+spat"),
        ("ocr",),
    ]


def test_a_model_is_evaluated_and_graded_and_graded_again_without_asking(
    server: Server, model: Pretrained, run: Run, tmp_path: Path
) -> None:
    changes = {"storage.store": str(tmp_path / "store"), "storage.benchmarks": str(SAMPLES)}
    resources = run.resources.with_changes(changes)
    suite = OfficialSuite(name="graded", benchmarks={"mm_vet": with_judge(server)}, bootstrap_resamples=20)
    report = evaluate(suite, model, None, resources)
    content = read_report(report)
    (metric,) = content.metrics
    assert metric.name.startswith("mm_vet_by_judge_t0_")
    assert (metric.value, metric.n) == (pytest.approx((0.5 + 1 + 0) / 3), 3), "prose is no grade and no zero"
    assert content.benchmarks["mm_vet"].failed == {"not_judged": 1}
    assert len(server.bodies) == 4
    assert rescore(suite, model, None, resources) == report
    assert len(server.bodies) == 4


def test_the_judge_completes_the_last_line_of_the_official_prompt(server: Server) -> None:
    config = with_judge(server)
    items = sample_items(config)
    (first, *_) = mm_vet.judge_requests(items, rows_of(items, config, lambda item, _: "a red dot"), config)
    text: Any = first.prompt.turns[-1][1][0]  # type: ignore[union-attr]
    notebook = (SAMPLES / "mm_vet/mm-vet_evaluator.ipynb").read_text()
    assert json.dumps(text.splitlines()[2])[1:-1] in notebook
    assert text.endswith("| 0.5\n\nWhich shape and colour is it? | circle <AND> red | a red dot | ")


@pytest.mark.parametrize(
    ("reply", "value"),
    [("0.7", 0.7), (" 1.0\n", 1), ("0 because", 0), ("1.1", None), ("nan", None), ("", None), ("about 0.5", None)],
)
def test_only_a_number_from_0_to_1_is_a_grade(reply: str, value: float | None) -> None:
    assert grade(reply) == value


def test_a_notebook_without_a_prompt_and_a_missing_key_are_named(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(SAMPLES / "mm_vet", tmp_path / "mm_vet"))
    file = folder / mm_vet.NOTEBOOK
    text = file.read_text()
    file.write_text(text.replace("prompt = ", "asked = "))
    with pytest.raises(ValueError, match=r"mm-vet_evaluator.ipynb assigns no text to `prompt` in any cell"):
        list(mm_vet.read(folder, PLAIN))
    file.write_text(text)
    (folder / "mm-vet.json").write_text('{"v1_0": {"question": ""}}')
    with pytest.raises(ValueError, match=r"mm-vet.json: record 1 has no 'imagename'"):
        list(mm_vet.read(folder, PLAIN))
