"""How far a stage is, as the holder of its lease hears it from rank 0."""

import io
import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from vila_ops import logs, tracing
from vila_ops.artifacts import leases
from vila_ops.artifacts.progress import ProgressRecord
from vila_ops.config import Resources
from vila_ops.config.resources import Accelerator
from vila_ops.train import loop, watchdog
from vila_ops.train.progress import StageReport
from vila_ops.train.stage import train_stage

CARD = Accelerator(name="a small one", memory_gib=1, peak_tflops=0.5, price_per_hour=7.2)


def test_a_stage_that_trains_says_how_far_it_is_and_then_that_it_is_done(
    bench: Any, make_stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    started, stage = time.time(), make_stage(bench.mixture)
    accelerator = {"train.accelerator": CARD.model_dump()}
    resources = bench.resources.with_changes({"storage.store": str(tmp_path / "store"), **accelerator})
    monkeypatch.setattr(watchdog, "TICK_SECONDS", 0.01)
    heard: list[ProgressRecord] = []
    own = loop.save_model

    def noted(engine: Any, job: Any, *rest: Any) -> None:
        report, deadline = StageReport(stage, resources, job.diagnostics()), time.monotonic() + 600
        while (told := report()).done < stage.num_steps or told.total is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        heard.append(told)
        own(engine, job, *rest)

    monkeypatch.setattr(loop, "save_model", noted)
    handler = logging.StreamHandler(io.StringIO())
    handler.setFormatter(logs.JsonFormatter())
    caplog.set_level(logging.INFO, "vila_ops")
    logging.getLogger("vila_ops").addHandler(handler)
    trained = train_stage(stage, bench.model, bench.data, bench.init, resources)
    logging.getLogger("vila_ops").removeHandler(handler)
    (told,) = heard
    lines = [json.loads(line) for line in handler.stream.getvalue().splitlines()]
    ids = {"task": "train_stage", "stage": "align", "address": Path(trained.uri).name, "rank": 0}
    assert [ids.items() <= line.items() for line in lines if line["logger"] == "vila_ops.progress"], lines
    assert all(ids.items() <= line.items() for line in lines if line["logger"] == "vila_ops.progress")
    assert (told.task, told.name, told.unit, told.done, told.total) == ("train_stage", "align", "steps", 8, 8)
    assert (told.resumed, told.workers, told.price_per_hour) == (0, 1, 7.2)
    curve = json.loads((Path(trained.uri) / json.loads(manifest_of(trained.uri))["data"] / "curve.json").read_text())
    assert told.metrics["loss"] == float.fromhex(curve[-1]["loss"])
    assert told.metrics["validation_loss"] == float.fromhex(curve[-1]["validation_loss"])
    assert started <= told.metrics["ckpt/saved_at"] <= time.time()
    (task,) = leases.tasks(str(tmp_path / "store"), since=0)
    assert task.at == f"checkpoint/{Path(trained.uri).name}"
    assert (task.record.outcome, task.progress.done, task.progress.total) == ("done", 8, 8)


def manifest_of(uri: str) -> str:
    return (Path(uri) / "manifest.json").read_text()


def test_a_stage_has_a_span_for_each_step(
    bench: Any, make_stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(ended))
    monkeypatch.setattr(tracing, "_provider", lambda: provider)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://nowhere.invalid")
    resources = bench.resources.with_changes({"storage.store": str(tmp_path)})
    stage = make_stage(bench.mixture, num_steps=2)
    with tracing.span("flow"):
        trained = train_stage(stage, bench.model, bench.data, bench.init, resources)
    *steps, rank, task, flow = ended.get_finished_spans()
    assert [span.name for span in (rank, task, flow)] == ["train_stage align, rank 0", "train_stage align", "flow"]
    assert [(span.name, span.attributes["vila.step"]) for span in steps] == [("training step", 1), ("training step", 2)]
    assert task.parent.span_id == flow.context.span_id
    assert rank.parent.span_id == task.context.span_id
    assert {span.parent.span_id for span in steps} == {rank.context.span_id}
    assert task.attributes == {"vila.task": "train_stage", "vila.stage": "align", "vila.address": name_of(trained.uri)}


def name_of(uri: str) -> str:
    return uri.rpartition("/")[2]


def test_what_another_attempt_or_a_damaged_file_says_changes_nothing(
    make_stage: Any, make_mixture: Any, tmp_path: Path
) -> None:
    report = StageReport(make_stage(make_mixture("pairs")), Resources(launch="inline"), tmp_path)
    first, file, first_at = report(), tmp_path / "rank-000.heartbeat.json", time.time() + 4
    said = {
        "time": time.time() + 5, "step": 3, "phase": "train", "seconds_in_phase": 2.0, "pid": 1, "host": "node-2",
        "metrics": {"num_steps": 8.0, "first_step": 2.0, "first_step_at": first_at, "loss": 2.5, "ckpt/saved_at": 9.0},
    }  # fmt: skip
    for wrong in ({**said, "time": first.began - 1}, {**said, "metrics": {"loss": float("nan")}}, {"time": 1e10}, []):
        file.write_text(json.dumps(wrong))
        assert report() == first
    file.write_text(json.dumps(said)[:-1])
    assert report() == first
    file.write_text(json.dumps(said))
    told = report()
    assert (told.done, told.total, told.resumed, told.host) == (3, 8, 2, "node-2")
    assert told.advanced == pytest.approx(said["time"] - 2)
    assert told.resumed_at == first_at
    file.unlink()
    assert report() == told, "between two attempts of the workers"
    file.write_text(json.dumps({**said, "step": 0, "phase": "load", "metrics": {}}))
    assert report() == told, "while the second workers load"
    again = {"num_steps": 8.0, "first_step": 5.0, "first_step_at": first_at + 60, "loss": 2.25}
    file.write_text(json.dumps({**said, "step": 6, "metrics": again}))
    resumed = report()
    assert (resumed.done, resumed.resumed, resumed.resumed_at) == (6, 2, first_at), "the pace is that of the attempt"
    assert (resumed.metrics["loss"], resumed.metrics["ckpt/saved_at"]) == (2.25, 9)
    file.unlink()
    report.end(8)
    assert (report().done, report().total) == (8, 8)
