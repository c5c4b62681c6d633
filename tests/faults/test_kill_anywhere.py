"""SIGKILL at random moments: started again, the pipeline ends with the digests of an unbroken run.

VILA_KILLS and VILA_KILLS_RAY set how many (`make faults`: 100 and 5), VILA_KILL_SEED which moments.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from vila_ops import local
from vila_ops.config.local import LocalServers

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("VILA_KILLS", "5"))
KILLS_RAY = int(os.environ.get("VILA_KILLS_RAY", "1"))
SEED = int(os.environ.get("VILA_KILL_SEED", str(time.time_ns() % 10**6)))
TIMEOUT_SECONDS = 600
Digests = dict[str, str]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Digests, float]:
    """The digests of a run that nobody kills, and its seconds."""
    folder = tmp_path_factory.mktemp("unbroken")
    started = time.monotonic()
    return _run_to_the_end(_inline(folder), {}), time.monotonic() - started


@pytest.mark.slow
@pytest.mark.timeout(4 * TIMEOUT_SECONDS + 60 * KILLS)
def test_killed_inline_it_ends_with_the_digests_of_an_unbroken_run(
    unbroken: tuple[Digests, float], tmp_path: Path
) -> None:
    digests, seconds = unbroken
    _kill_and_finish(lambda name: _inline(_made(tmp_path / name)), {}, digests=digests, kills=KILLS, within=seconds)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(4 * TIMEOUT_SECONDS + 180 * KILLS_RAY)
def test_killed_under_ray_it_ends_with_the_digests_of_an_unbroken_run(
    ray_cluster: tuple[str, dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    address, env = ray_cluster
    started = time.monotonic()
    digests = _run_to_the_end(_on_ray(tmp_path_factory.mktemp("whole"), address), env)
    seconds = time.monotonic() - started
    killed = tmp_path_factory.mktemp("killed")
    _kill_and_finish(
        lambda name: _on_ray(_made(killed / name), address), env, digests=digests, kills=KILLS_RAY, within=seconds
    )


@pytest.fixture(scope="module")
def ray_cluster(
    tmp_path_factory: pytest.TempPathFactory, free_servers: Callable[[Path], LocalServers]
) -> Iterator[tuple[str, dict[str, str]]]:
    """A Ray head of this test's own: its address and the environment that may use it."""
    settings = free_servers(tmp_path_factory.mktemp("servers"))
    try:
        yield local.up(settings, only=("ray",)).ray, local.env(settings)
    finally:
        local.down(settings)


def _kill_and_finish(
    command_in: Callable[[str], list[str]], env: dict[str, str], *, digests: Digests, kills: int, within: float
) -> None:
    """So many kills of a pipeline at work; where one ended before its kill, the next is of a new one."""
    draw = random.Random(SEED)
    moments: list[float] = []
    pipelines = 0
    while len(moments) < kills:
        command = command_in(f"pipeline-{pipelines}")
        pipelines += 1
        while len(moments) < kills and (moment := _killed(command, env, after=draw.uniform(0, within))) is not None:
            moments.append(moment)
        assert _run_to_the_end(command, env) == digests, f"seed {SEED}, killed after {moments} s"


def _killed(command: list[str], env: dict[str, str], *, after: float) -> float | None:
    """The moment in seconds at which it was killed, with its whole process group; None where it had ended well."""
    with subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **env}, start_new_session=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as running:  # fmt: skip
        try:
            assert running.wait(timeout=after) == 0, f"seed {SEED}"
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            if running.wait() == -signal.SIGKILL:
                return after
    return None


def _run_to_the_end(command: list[str], env: dict[str, str]) -> Digests:
    """Digests of every checkpoint and report of a whole run."""
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=TIMEOUT_SECONDS,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    outcome = json.loads(done.stdout)
    made = {f"{kind}/{name}": one for kind in ("checkpoints", "probes") for name, one in outcome[kind].items()}
    return {name: one["digest"] for name, one in {**made, "report": outcome["report"]}.items()}


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _inline(folder: Path) -> list[str]:
    return _command(folder, {"launch": "inline"})


def _on_ray(folder: Path, address: str) -> list[str]:
    cluster = {"launch": "ray", "ray_address": address, "num_workers": 2, "zero_stage": 2}
    return _command(folder, cluster)


def _command(folder: Path, resources: dict[str, object]) -> list[str]:
    file = folder / "resources.yaml"
    file.write_text(yaml.safe_dump({**resources, "store": str(folder / "store"), "cache": str(folder / "cache")}))
    program = Path(sys.executable).parent / "vila-ops"
    return [str(program), "run", "configs/recipes/tiny.yaml", "-r", str(file), "--json"]
