"""SIGKILL at random moments: the restarted pipeline ends with the digests and samples of an uninterrupted run.

The curve of a stage is a file of its checkpoint, so equal digests mean equal losses, bit for bit.

VILA_KILLS and VILA_KILLS_RAY set the number of kills (`make faults`: 100 and 5). Without them there is none, as each
takes minutes: the flow's test kills a whole run, and test_failpoints.py kills a stage at its calls. VILA_SEED sets the
moments.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from tests.seed import SEED
from vila_ops.config.load import merge
from vila_ops.train.sample_log import Keys, StepSamples, first_mismatch, global_batches, read_sample_log

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("VILA_KILLS", "0"))
KILLS_RAY = int(os.environ.get("VILA_KILLS_RAY", "0"))
TIMEOUT_SECONDS = 600
Digests = dict[str, str]
Samples = dict[str, dict[int, tuple[Keys, ...]]]
"""Samples of the global batch, by address of the stage and step."""


class Whole(NamedTuple):
    """An uninterrupted run."""

    digests: Digests
    samples: Samples
    seconds: float


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """An uninterrupted run in one process."""
    folder = tmp_path_factory.mktemp("unbroken")
    return _whole(folder, _inline(folder))


@pytest.mark.slow
@pytest.mark.timeout(4 * TIMEOUT_SECONDS + 60 * KILLS)
@pytest.mark.skipif(not KILLS, reason="VILA_KILLS says how many kills")
def test_killed_inline_it_ends_as_an_unbroken_run(unbroken: Whole, tmp_path: Path) -> None:
    _kill_and_finish(tmp_path, _inline, whole=unbroken, kills=KILLS)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(4 * TIMEOUT_SECONDS + 180 * KILLS_RAY)
@pytest.mark.skipif(not KILLS_RAY, reason="VILA_KILLS_RAY says how many kills")
def test_killed_under_ray_it_ends_as_an_unbroken_run(
    ray_cluster: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("whole")
    whole = _whole(folder, _on_ray(folder, ray_cluster))
    killed = tmp_path_factory.mktemp("killed")
    _kill_and_finish(killed, lambda folder: _on_ray(folder, ray_cluster), whole=whole, kills=KILLS_RAY)


def _whole(folder: Path, command: list[str]) -> Whole:
    started = time.monotonic()
    digests = _run_to_the_end(command)
    seconds = time.monotonic() - started
    return Whole(digests, {stage: global_batches(reads) for stage, reads in _reads(folder).items()}, seconds)


def _kill_and_finish(root: Path, command_in: Callable[[Path], list[str]], *, whole: Whole, kills: int) -> None:
    """Kill running pipelines `kills` times. If a pipeline ends before its kill, a new pipeline is started."""
    draw = random.Random(SEED)
    moments: list[float] = []
    pipelines = 0
    while len(moments) < kills:
        folder = _made(root / f"pipeline-{pipelines}")
        command = command_in(folder)
        pipelines += 1
        while len(moments) < kills:
            moment = _killed(command, after=draw.uniform(0, whole.seconds))
            if moment is None:
                break
            moments.append(moment)
        assert _run_to_the_end(command) == whole.digests, f"seed {SEED}, killed after {moments} s"
        reads = _reads(folder)
        assert reads.keys() == whole.samples.keys()
        for stage, own in reads.items():
            assert first_mismatch(own, whole.samples[stage]) is None, f"seed {SEED}, killed after {moments} s"
            assert {read.step for read in own} == whole.samples[stage].keys()


def _killed(command: list[str], *, after: float) -> float | None:
    """Kill a pipeline and its process group. Returns the moment in seconds, or None if it had succeeded before."""
    with subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as running:  # fmt: skip
        try:
            assert running.wait(timeout=after) == 0, f"seed {SEED}"
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            if running.wait() == -signal.SIGKILL:
                return after
    return None


def _run_to_the_end(command: list[str]) -> Digests:
    """Return the digests of all checkpoints and reports of a run."""
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_SECONDS,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    outcome = json.loads(done.stdout)
    made = {f"{kind}/{name}": one for kind in ("models", "stage_reports") for name, one in outcome[kind].items()}
    return {name: one["digest"] for name, one in {**made, "report": outcome["report"]}.items()}


def _reads(folder: Path) -> dict[str, list[StepSamples]]:
    """Return the samples that each stage of a pipeline read."""
    return {stage.name: read_sample_log(stage) for stage in (folder / "store/sample_log").iterdir()}


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _inline(folder: Path) -> list[str]:
    return _command(folder, {"launch": "inline"})


def _on_ray(folder: Path, address: str) -> list[str]:
    cluster = {"launch": "ray", "ray_address": address, "train": {"num_workers": 2, "zero_stage": 2}}
    return _command(folder, cluster)


def _command(folder: Path, resources: dict[str, object]) -> list[str]:
    file = folder / "resources.yaml"
    places = {name: str(folder / name) for name in ("store", "cache")}
    settings = merge(resources, {"storage": places, "train": {"record_samples": True}})
    file.write_text(yaml.safe_dump(settings))
    program = Path(sys.executable).parent / "vila-ops"
    return [str(program), "run", "configs/recipes/tiny.yaml", "-r", str(file), "--json"]
