"""Reports on a small ChartQA of two questions a chart, sealed from given answers: no model is needed."""

import io
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from PIL import Image

from tests.eval.benchmarks.sample import config_of, rows_of
from vila_ops.artifacts import store
from vila_ops.artifacts.execution import execution
from vila_ops.artifacts.kinds import BenchmarkResult, Checkpoint, EvalReport
from vila_ops.config import OfficialSuite, Resources
from vila_ops.config.benchmarks import ChartQa
from vila_ops.eval.evaluate import evaluate
from vila_ops.eval.job import EvalJob
from vila_ops.eval.report import write_result
from vila_ops.eval.scoring import score
from vila_ops.eval.sealed import items_of, seal_files

PARTS = ("human", "augmented")
METRIC = "charts_official"


def write_charts(folder: Path, count: int, **labels: str) -> Path:
    """The official files of so many charts; each has a question in both files. `labels`: other answers, by item."""
    pngs = folder / "chartqa/test/png"
    pngs.mkdir(parents=True)
    for chart in range(count):
        data = io.BytesIO()
        Image.new("RGB", (8, 8), (chart, 0, 0)).save(data, "PNG")
        (pngs / f"{chart}.png").write_bytes(data.getvalue())
    for part in PARTS:
        records = [
            {
                "imgname": f"{chart}.png",
                "query": f"{part} question {chart}?",
                "label": labels.get(f"{part}-{chart}", "yes"),
            }
            for chart in range(count)
        ]
        (pngs.parent / f"test_{part}.json").write_text(json.dumps(records))
    return folder


def suite_of(name: str = "official", **changes: Any) -> OfficialSuite:
    """The charts as a suite."""
    return OfficialSuite(name=name, benchmarks={"charts": config_of(ChartQa, **changes)}, bootstrap_resamples=50)


def checkpoint_of(name: str) -> Checkpoint:
    """A reference to a model that nobody has."""
    return Checkpoint(uri=f"nowhere/{name}", digest=name, parents=("data", "init"), stage="sft", step=1)


def sealed_report(
    resources: Resources, model: Checkpoint, right: Collection[str], suite: OfficialSuite | None = None
) -> EvalReport:
    """The report of a model that answers these items right, such as human-0, and all others with `no`."""
    suite = suite or suite_of()
    files = {name: seal_files(config, resources) for name, config in suite.benchmarks.items()}
    job = EvalJob(suite=suite, model=model, files=files, resources=resources)
    for name, config in suite.benchmarks.items():
        items = list(items_of(files[name]))
        rows = rows_of(items, config, lambda item, _: item.references if item.id in right else "no")
        scored, at = score(items, rows, config, job.settings()), job.address(name)
        attempt = store.begin(at, store=resources.storage.store)
        write_result(attempt, scored.measurement, scored.rows, {})
        facts = {"benchmark": config.kind, "model": model.digest}
        store.seal(
            BenchmarkResult,
            at,
            attempt,
            facts=facts,
            execution=execution(launch="inline", seconds=0, ran=[]) | {"seconds_of": [0.0] * len(rows)},
        )
    return evaluate(suite, model, None, resources)
