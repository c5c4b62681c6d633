"""Disks that are full, broken or read-only: the error has path and bytes, and the checkpoint before is intact.

VILA_DISK sets the number of faults (12; `make faults`: 50), VILA_SEED which.
"""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.seed import SEED
from tests.test_exactness import write_data
from vila_ops.config import Resources
from vila_ops.train.checkpoint.checkpointer import Checkpointer
from vila_ops.train.job import RankInfo

HERE = Path(__file__).parent
COUNT = int(os.environ.get("VILA_DISK", "12"))
DISK_BYTES = 1_000_000


@pytest.mark.slow
@pytest.mark.timeout(1200 + 4 * COUNT)
def test_a_call_that_fails_anywhere_is_told_and_costs_no_checkpoint(tmp_path: Path) -> None:
    env = {**os.environ, "LD_PRELOAD": str(faulty_disk(tmp_path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, HERE / "disk_that_fails.py", tmp_path / "disk", str(COUNT), str(SEED)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"seed {SEED}: {done.stderr[-3000:]}"
    cases = json.loads(done.stdout)
    assert len(cases) == COUNT
    for case in cases:
        _check(case)


def faulty_disk(folder: Path) -> Path:
    """The library that makes calls fail."""
    library = folder / "faulty_disk.so"
    subprocess.run(["g++", "-shared", "-fPIC", "-O1", "-o", library, HERE / "faulty_disk.cpp", "-ldl"], check=True)
    return library


def _check(case: dict[str, Any]) -> None:
    """Checks what holds after any fault. A rename that was done but reported as failed leaves the new one intact."""
    assert case["hit"], case
    assert case["well"] == 4, case
    if case["call"] == "read":
        assert case["after"] == 2, case
        assert case["raised"] is None, case
        return
    assert case["raised"]["errno"] == case["errno"], case
    assert case["folder"] in case["raised"]["text"], case
    assert os.strerror(case["errno"]) in case["raised"]["text"], case
    if case["call"] == "write":
        assert "bytes" in case["raised"]["text"], case
    assert case["after"] in (2, 4), case
    if case["call"] in ("open", "write", "mkdir"):
        assert case["after"] == 2, case


def test_a_full_and_a_read_only_disk(
    make_disk: Callable[[int], Path], make_resources: Callable[..., Resources]
) -> None:
    small_disk = make_disk(DISK_BYTES)
    resume = small_disk / "resume"

    def attempt() -> Checkpointer:
        return Checkpointer(str(resume), RankInfo(), make_resources(small_disk), live=True)

    def save(step: int) -> None:
        checkpoints = attempt()
        checkpoints.save(step, iter([("w", {"param": torch.full((50_000,), float(step))})]), [])
        checkpoints.close()

    def newest() -> int:
        newest = attempt().newest()
        assert newest is not None
        return int(newest[1]["step"])

    save(2)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(700_000))
    with pytest.raises(
        OSError, match=r"safetensors was not written \(No space left on device, after \d+ of 2\d+ bytes"
    ) as full:
        save(4)
    assert full.value.errno == errno.ENOSPC
    assert [path.name for path in resume.iterdir()] == ["step-000002"], "a draft would keep the disk full"
    assert newest() == 2
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(OSError, match="Read-only file system") as read_only:
        save(4)
    assert (read_only.value.errno, str(resume) in str(read_only.value)) == (errno.EROFS, True)
    assert newest() == 2
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    save(4)
    assert newest() == 4


@pytest.mark.slow
def test_a_task_whose_disk_fails_names_path_and_bytes_leaves_nothing_and_works_again(tmp_path: Path) -> None:
    write_data(tmp_path)
    env = {**os.environ, "LD_PRELOAD": str(faulty_disk(tmp_path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, HERE / "tasks_on_failing_disk.py", tmp_path, str(SEED)]
    done = subprocess.run(
        command, env=env | {"PYTHONPATH": str(HERE.parents[1])}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"seed {SEED}: {done.stderr[-3000:]}"
    cases = json.loads(done.stdout)
    assert [case["task"] for case in cases] == ["assemble", "prepare", "train_stage", "evaluate", "export"]
    for case in cases:
        failed = case["failed"]
        assert failed["failed"], case
        assert case["disk"] in failed["error"], case
        assert os.strerror(case["errno"]) in failed["error"], case
        assert "bytes" in failed["error"], case
        assert failed["left"] == [], case
        made = [one["made"].replace(case["disk"], "DISK") for one in (case["sound"], case["again"])]
        assert made[0].replace(str(tmp_path / "sound"), "DISK") == made[1], case
