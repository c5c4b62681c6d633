"""The work of `evaluate`: one model through a suite's benchmarks, in this process."""

import logging
import time
from dataclasses import dataclass, field
from typing import Any, assert_never

from vila_ops.cluster import whoami
from vila_ops.config.eval import (
    Alignment,
    Benchmark,
    CaptionCider,
    CaptionLoss,
    MultipleChoice,
    PopeBenchmark,
    TextLoss,
    TextMultipleChoice,
)
from vila_ops.eval.benchmarks.held_out.alignment import alignment
from vila_ops.eval.benchmarks.held_out.captions import caption_loss, multiple_choice
from vila_ops.eval.benchmarks.held_out.cider import caption_cider
from vila_ops.eval.benchmarks.held_out.items import read_items
from vila_ops.eval.benchmarks.held_out.pope import pope
from vila_ops.eval.benchmarks.held_out.words import text_loss, text_multiple_choice
from vila_ops.eval.job import EvalJob
from vila_ops.eval.runner import BenchmarkRunner, Metric, as_json
from vila_ops.generate.engine import EngineOptions
from vila_ops.generate.load import load_engine

log = logging.getLogger(__name__)


def run(job: EvalJob) -> dict[str, Any]:
    """The report: metrics with intervals, and what the model said."""
    items = read_items(job.data, job.suite)
    options = EngineOptions(
        feature_root=job.resources.storage.scratch() / "features",
        threads=job.resources.evaluate.threads_per_worker,
        precision=job.suite.precision,
    )
    engine = load_engine(job.model, job.resources.evaluate.engine, options)
    bench = BenchmarkRunner(engine, items, job.suite)
    metrics: list[Metric] = []
    answers: list[dict[str, str]] = []
    layers: list[dict[str, Any]] = []
    for name, benchmark in job.suite.benchmarks.items():
        started = time.monotonic()
        found = _measure(benchmark, bench)
        metrics += found.metrics
        answers += found.answers
        layers += found.layers
        log.info("%s: %s in %.0f s", job.suite.name, name, time.monotonic() - started)
    report = {
        "suite": job.suite.name,
        "split": job.suite.split,
        "model": job.model.digest,
        "data": job.data.digest,
        "images": len(items.images),
        "objects": len(set(bench.objects)),
        "metrics": as_json(metrics),
        "layers": layers,
        "answers": answers,
    }
    return {"report": report, "ran": whoami()}


@dataclass(frozen=True)
class _Found:
    """What a benchmark found."""

    metrics: list[Metric]
    answers: list[dict[str, str]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)


def _measure(benchmark: Benchmark, bench: BenchmarkRunner) -> _Found:
    match benchmark:
        case CaptionLoss():
            return _Found(caption_loss(bench, benchmark))
        case MultipleChoice():
            return _Found(multiple_choice(bench, benchmark))
        case CaptionCider():
            metrics, answers = caption_cider(bench, benchmark)
            return _Found(metrics, answers=answers)
        case PopeBenchmark():
            return _Found(pope(bench, benchmark))
        case TextMultipleChoice():
            return _Found(text_multiple_choice(bench))
        case TextLoss():
            return _Found(text_loss(bench))
        case Alignment():
            metrics, layers = alignment(bench, benchmark)
            return _Found(metrics, layers=layers)
        case _:
            assert_never(benchmark)
