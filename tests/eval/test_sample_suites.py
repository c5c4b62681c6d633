"""The suites of the committed samples; test_official_suite.py runs the one with images as a command."""

from pathlib import Path
from typing import get_args

from tests.eval.benchmarks.sample import ROOT, SAMPLES
from vila_ops.artifacts.kinds import Pretrained
from vila_ops.config import OfficialSuite, Run
from vila_ops.config.benchmarks import Official, SeedBench
from vila_ops.config.load import load_suite
from vila_ops.eval.evaluate import evaluate
from vila_ops.eval.report import read_report


def suite_of(name: str) -> OfficialSuite:
    return load_suite(ROOT / f"configs/suites/{name}.yaml")


def test_every_kind_has_a_sample_in_a_suite() -> None:
    kinds = {one.model_fields["kind"].default for one in get_args(Official)}
    assert suite_of("sample").benchmarks.keys() | suite_of("sample_text").benchmarks.keys() == kinds
    assert {path.name for path in SAMPLES.iterdir() if path.is_dir()} == kinds


def test_the_suite_of_table_5_has_its_twelve_benchmarks_and_those_of_text() -> None:
    """Of the paper's columns: VQAv2 to MM-Vet, and MMLU, BBH and DROP."""
    table5 = "vqav2 gqa vizwiz scienceqa textvqa pope mme mmbench mmbench_cn seed_bench llava_bench mm_vet"
    suite = suite_of("table5")
    assert list(suite.benchmarks) == [*table5.split(), "mmlu", "bbh", "drop"]
    assert {name: one.kind for name, one in suite.benchmarks.items()} == {name: name for name in suite.benchmarks}
    seed_bench = suite.benchmarks["seed_bench"]
    assert isinstance(seed_bench, SeedBench)
    assert seed_bench.subset == "total"


def test_likelihoods_and_running_text_are_measured_on_a_model(model: Pretrained, run: Run, tmp_path: Path) -> None:
    resources = run.resources.with_changes({"storage.benchmarks": str(SAMPLES), "storage.store": str(tmp_path)})
    report = read_report(evaluate(suite_of("sample_text"), model, None, resources))
    assert {name: one.num_items for name, one in report.benchmarks.items()} == {"mmlu": 4, "bbh": 3, "drop": 5}
    assert {status for one in report.benchmarks.values() for status in one.failed} <= {"too_long"}
    names = {metric.name for metric in report.metrics}
    assert {"mmlu_2shot_macro_official", "bbh_direct_macro_official", "drop_3shot_f1_corrected"} <= names
