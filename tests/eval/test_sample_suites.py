"""The suites of the committed samples on the untrained model of the tiny recipe: every item is asked and has a row."""

from pathlib import Path
from typing import Any

import pytest

from tests.eval.benchmarks.sample import ROOT, SAMPLES
from vila_ops.artifacts.kinds import Pretrained
from vila_ops.config import OfficialSuite, Run
from vila_ops.config.load import load_suite
from vila_ops.eval.evaluate import evaluate
from vila_ops.eval.report import read_report


def short(name: str) -> OfficialSuite:
    """A suite whose answers have two tokens."""

    def cut(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: 2 if key == "max_new_tokens" else cut(one) for key, one in value.items()}

    suite = load_suite(ROOT / f"configs/suites/{name}.yaml")
    return OfficialSuite.model_validate({**cut(suite.model_dump()), "bootstrap_resamples": 20})


@pytest.mark.parametrize("name", ["sample", "sample_text"])
def test_every_sample_gives_its_metrics(name: str, model: Pretrained, run: Run, tmp_path: Path) -> None:
    suite = short(name)
    resources = run.resources.with_changes({"storage.benchmarks": str(SAMPLES), "storage.store": str(tmp_path)})
    report = read_report(evaluate(suite, model, None, resources))
    assert report.benchmarks.keys() == suite.benchmarks.keys()
    assert {status for one in report.benchmarks.values() for status in one.failed} <= {"too_long"}
    without_judge = {"llava_bench", "mm_vet"}
    names = {metric.name for metric in report.metrics}
    for kind in suite.benchmarks.keys() - without_judge:
        assert any(name.startswith(kind) for name in names), kind
