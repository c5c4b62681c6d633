"""The work of `evaluate`: one model through a suite's benchmarks, in this process."""

import logging
import time
from typing import Any, assert_never

from vila_ops.cluster import whoami
from vila_ops.config.eval import (
    Benchmark,
    CaptionCider,
    CaptionLoss,
    MultipleChoice,
    Pope,
    TextLoss,
    TextMultipleChoice,
)
from vila_ops.eval.bench import Bench, Metric, as_json
from vila_ops.eval.benchmarks.captions import caption_loss, multiple_choice
from vila_ops.eval.benchmarks.cider import caption_cider
from vila_ops.eval.benchmarks.pope import pope
from vila_ops.eval.benchmarks.words import text_loss, text_multiple_choice
from vila_ops.eval.items import read_items
from vila_ops.eval.job import Job
from vila_ops.generate.load import load_generator

log = logging.getLogger(__name__)


def run(job: Job) -> dict[str, Any]:
    """The report: metrics with intervals, and what the model said."""
    items = read_items(job.data, job.suite)
    generator = load_generator(
        job.model,
        feature_root=job.resources.scratch() / "features",
        threads=job.resources.threads_per_worker,
        precision=job.suite.precision,
    )
    bench = Bench(generator, items, job.suite)
    metrics: list[Metric] = []
    answers: list[dict[str, str]] = []
    for name, benchmark in job.suite.benchmarks.items():
        started = time.monotonic()
        found, said = _measure(benchmark, bench)
        metrics += found
        answers += said
        log.info("%s: %s in %.0f s", job.suite.name, name, time.monotonic() - started)
    report = {
        "suite": job.suite.name,
        "split": job.suite.split,
        "model": job.model.digest,
        "data": job.data.digest,
        "pictures": len(items.pictures),
        "objects": len(set(bench.objects)),
        "metrics": as_json(metrics),
        "answers": answers,
    }
    return {"report": report, "ran": whoami()}


def _measure(benchmark: Benchmark, bench: Bench) -> tuple[list[Metric], list[dict[str, str]]]:
    match benchmark:
        case CaptionLoss():
            return caption_loss(bench, benchmark), []
        case MultipleChoice():
            return multiple_choice(bench, benchmark), []
        case CaptionCider():
            return caption_cider(bench, benchmark)
        case Pope():
            return pope(bench, benchmark), []
        case TextMultipleChoice():
            return text_multiple_choice(bench), []
        case TextLoss():
            return text_loss(bench), []
        case _:
            assert_never(benchmark)
