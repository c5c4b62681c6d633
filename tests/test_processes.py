"""Real processes: named by pid and start time, started in a session of their own, ended to the last one."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from vila_ops.processes import ProcessId, session_of, spawn, stop, this_process

SLEEP = "import time; time.sleep(600)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
)
FAMILY = f"""
import subprocess, sys, time
for new_session in (False, True):
    child = subprocess.Popen([sys.executable, "-c", {SLEEP!r}], start_new_session=new_session)
    print(child.pid, flush=True)
print("ready", flush=True)
time.sleep(600)
"""


@pytest.fixture
def run(tmp_path: Path):
    """Starts a program, waits until it has printed `ready` where it does, and ends it with the test."""
    started: list[ProcessId] = []

    def start(code: str, *, ready: bool = False) -> tuple[ProcessId, Path]:
        log = tmp_path / f"{len(started)}.log"
        started.append(spawn([sys.executable, "-c", code], env={**os.environ}, log=log))
        if ready:
            wait_for(lambda: "ready" in log.read_text())
        return started[-1], log

    yield start
    for process in started:
        stop(process, grace_seconds=0.1)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 1200
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_process_has_its_own_session_no_input_and_its_output_in_a_private_log(run) -> None:
    process, log = run("import sys; print(repr(sys.stdin.read())); print('to stderr', file=sys.stderr)")
    wait_for(lambda: not process.alive())
    assert log.read_text().splitlines() == ["''", "to stderr"]
    assert log.stat().st_mode & 0o077 == 0
    other, _ = run(SLEEP)
    assert os.getsid(other.pid) == other.pid != os.getsid(0)


def test_the_environment_is_the_given_one_alone(tmp_path: Path) -> None:
    process = spawn(
        [sys.executable, "-c", "import os; print(sorted(os.environ))"], env={"A": "1"}, log=tmp_path / "log"
    )
    wait_for(lambda: not process.alive())
    stop(process, grace_seconds=1)
    assert "'A'" in (tmp_path / "log").read_text()
    assert "HOME" not in (tmp_path / "log").read_text()


def test_another_process_under_the_pid_is_neither_alive_nor_stopped(run) -> None:
    process, _ = run(SLEEP)
    earlier = ProcessId(process.pid, process.started - 3600)
    assert process.alive()
    assert not earlier.alive()
    assert session_of(earlier) == []
    stop(earlier, grace_seconds=0.1)
    assert process.alive()


def test_a_process_that_has_ended_is_not_alive_although_nobody_reaped_it(run) -> None:
    process, _ = run(SLEEP)
    os.kill(process.pid, signal.SIGKILL)
    wait_for(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE)
    assert not process.alive()


def test_this_process_is_alive() -> None:
    assert this_process().pid == os.getpid()
    assert this_process().alive()


@pytest.mark.parametrize("leader_dies", [False, True])
def test_stop_ends_the_children_in_the_session_and_those_in_sessions_of_their_own(run, leader_dies: bool) -> None:
    process, log = run(FAMILY, ready=True)
    children = [psutil.Process(int(line)) for line in log.read_text().split()[:2]]
    assert {child.pid for child in children} < {member.pid for member in session_of(process)}
    if leader_dies:  # a child in a session of its own cannot be found any more
        os.kill(process.pid, signal.SIGKILL)
        wait_for(lambda: not process.alive())
        children[1].kill()
    stop(process, grace_seconds=10)
    assert not process.alive()
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)


def test_a_process_that_ignores_sigterm_is_killed_after_the_grace(run) -> None:
    process, _ = run(STUBBORN, ready=True)
    began = time.monotonic()
    stop(process, grace_seconds=0.3)
    assert not process.alive()
    assert time.monotonic() - began >= 0.3
    assert not psutil.pid_exists(process.pid)  # its parent, this process, has reaped it
