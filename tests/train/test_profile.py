"""The table of a profile: from events whose times are counted by hand, and from steps that were really profiled."""

import gzip
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vila_ops.config import NO_CONTEXT
from vila_ops.train.job import RankInfo, TrainJob
from vila_ops.train.loop import train
from vila_ops.train.profile import PARTS, table, times_of

LOOP, OTHER = 1, 2
"""Threads."""


def event(name: str, start: float, end: float, *, thread: int = LOOP, device: str = "CPU", **kernels: float) -> Any:
    """An event as torch's profiler has it, in milliseconds, with the kernels that it launched."""
    return SimpleNamespace(
        name=name, thread=thread, is_user_annotation=name.startswith("vila-ops/"),
        device_type=SimpleNamespace(name=device), time_range=SimpleNamespace(start=1000 * start, end=1000 * end),
        kernels=[SimpleNamespace(name=kernel, duration=1000 * took) for kernel, took in kernels.items()],
    )  # fmt: skip


EVENTS = [
    event("ProfilerStep#2", 100, 200),
    event("vila-ops/data", 100, 105),
    event("vila-ops/forward", 110, 140),
    event("vila-ops/tower", 110, 120),
    event("vila-ops/backward", 140, 180),
    event("c10d::allreduce_", 150, 152),
    event("gloo:all_reduce", 150, 160, thread=OTHER),
    event("vila-ops/update", 180, 190),
    event("gloo:all_reduce", 188, 192, thread=OTHER),
    event("vila-ops/waiting", 190, 198),
    event("vila-ops/forward", 110, 140, thread=OTHER),
    event("ProfilerStep#3", 200, 300),
    event("vila-ops/backward", 210, 300),
    event("vila-ops/forward", 310, 330),
]
"""Two steps, with a loop of another thread, and what came after them."""
HOST = {
    "data": 5, "copies": 0, "tower": 10, "forward": 20, "backward": 30 + 90, "communication": 10 + 4, "update": 8,
    "waiting": 6, "other": 5 + 2 + 10,
}  # fmt: skip


def test_each_moment_of_the_loop_belongs_to_the_innermost_part() -> None:
    times = times_of(EVENTS)
    assert times.host == pytest.approx({part: HOST[part] / 2 for part in PARTS})
    assert sum(times.host.values()) == pytest.approx(100)
    assert times.device == {}


def test_kernels_belong_to_the_part_that_launched_them_and_an_idle_device_waits() -> None:
    """Kernels run from 115 to 175, with one of NCCL beside them, and from 220 to 290: 130 of 200 ms."""
    launched = [
        event("aten::mm", 112, 113, gemm=20),
        event("aten::mm", 125, 126, gemm=10),
        event("aten::mm", 145, 146, thread=OTHER, gemm=30, ncclDevKernel_AllReduce=15),
        event("aten::mm", 215, 216, thread=OTHER, gemm=65),
        event("aten::copy_", 216, 217, thread=OTHER, **{"Memcpy DtoD (Device -> Device)": 5}),
    ]
    kernels = [
        event("gemm", 115, 175, device="CUDA"),
        event("ncclDevKernel_AllReduce", 150, 165, device="CUDA"),
        event("gemm", 220, 290, device="CUDA"),
        event("vila-ops/backward", 140, 300, device="CUDA"),
    ]
    device = times_of([*EVENTS, *launched, *kernels]).device
    expected = {"tower": 20, "forward": 10, "backward": 30 + 65, "communication": 15, "copies": 5, "waiting": 70}
    assert device == pytest.approx({part: expected.get(part, 0) / 2 for part in PARTS})


def test_the_table_has_a_line_for_each_part_and_the_step() -> None:
    lines = table(times_of(EVENTS))
    assert [line.split()[0] for line in lines] == ["part", *PARTS, "step"]
    assert lines[5].split() == ["backward", "60.0", "60.0%"]
    assert lines[-1].split() == ["step", "100.0", "100.0%"]


def job_of(bench: Any, stage: Any, root: Path, **resources: Any) -> TrainJob:
    return TrainJob(
        stage=stage, data=bench.data, init=bench.init, attempt=str(root), resume=str(root / "resume"), run_id=None,
        resources=bench.resources.with_changes({"storage.store": str(root), **resources}), fresh_projector=False,
        context=NO_CONTEXT,
    )  # fmt: skip


def test_a_stage_profiles_the_steps_after_two_and_trains_the_same(bench: Any, make_stage: Any, tmp_path: Path) -> None:
    stage = make_stage(bench.mixture, trainable=["projector", "language_model"], num_steps=5, validation_rows=1)
    for profiled in (0, 2):
        (tmp_path / str(profiled)).mkdir()
        train(job_of(bench, stage, tmp_path / str(profiled), **{"train.profile_steps": profiled}), RankInfo())
    curves = [(tmp_path / str(profiled) / "curve.json").read_text() for profiled in (0, 2)]
    assert curves[0] == curves[1]
    files = sorted(tmp_path.glob("*/diagnostics/*/profile-*"))
    assert [file.name for file in files] == ["profile-000003-000004.json.gz", "profile-000003-000004.txt"]
    assert "2" in files[0].relative_to(tmp_path).parts
    events = json.loads(gzip.decompress(files[0].read_bytes()))["traceEvents"]
    lengths = [one["dur"] for one in events if one.get("name", "").startswith("ProfilerStep#")]
    rows = {line.split()[0]: float(line.split()[1]) for line in files[1].read_text().splitlines()[1:]}
    assert rows["step"] == pytest.approx(sum(lengths) / 2000, abs=0.2)
    assert sum(rows[part] for part in PARTS) == pytest.approx(rows["step"], abs=0.5)
    assert min(rows["forward"], rows["backward"], rows["update"]) > 0
    assert rows["communication"] == 0


def test_a_stage_that_ends_before_its_profile_says_so(
    bench: Any, make_stage: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stage = make_stage(bench.mixture, num_steps=1, validation_rows=1)
    train(job_of(bench, stage, tmp_path, **{"train.profile_steps": 2}), RankInfo())
    told = [one.message for one in caplog.records if one.levelno == logging.WARNING]
    assert "align: no profile, which begins after 2 steps; the stage ended before" in told
    assert not list(tmp_path.glob("diagnostics/*/profile-*"))
