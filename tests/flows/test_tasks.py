"""The task `train_stage` when its flow run is ended, without Prefect's server and without a cluster."""

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prefect.exceptions import TerminationSignal

from flows import tasks
from tests.flows.flow_runs import ROOT
from vila_ops.config import Resources
from vila_ops.errors import ClusterUnreachable
from vila_ops.train.stage import FollowedJob

JOB = FollowedJob("0123", "http://head")
ANYTHING: Any = object()


class Stage:
    name = "sft"


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> list[FollowedJob]:
    """Jobs that were stopped. The stage is trained by JOB."""
    jobs: list[FollowedJob] = []
    monkeypatch.setattr(tasks, "job_of", lambda *_: JOB)
    monkeypatch.setattr(tasks, "stop_job", jobs.append)
    return jobs


def train() -> None:
    stage: Any = Stage()
    tasks.TASKS.train_stage(stage, ANYTHING, ANYTHING, ANYTHING, Resources(launch="inline"))


@pytest.mark.parametrize(
    "fault", [ClusterUnreachable("`ray job stop ID` ends it"), ValueError("the job server asks for a token"), None]
)
@pytest.mark.parametrize("cancelled", [True, False])
def test_a_job_that_cannot_be_stopped_leaves_the_signal_as_it_is(
    cancelled: bool,
    fault: Exception | None,
    stopped: list[FollowedJob],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Prefect would try the task again after another error, and follow the job of a cancelled flow run."""

    def ended(*_: Any) -> None:
        raise TerminationSignal(signal.SIGTERM)

    def stop_job(job: FollowedJob) -> None:
        stopped.append(job)
        if fault is not None:
            raise fault

    monkeypatch.setattr(tasks, "_train_stage", ended)
    monkeypatch.setattr(tasks, "stop_job", stop_job)
    monkeypatch.setattr(tasks, "cancelled", lambda: cancelled)
    with caplog.at_level(logging.ERROR, "vila_ops"), pytest.raises(TerminationSignal):
        train()
    assert stopped == [JOB] * cancelled
    told = [f"the job of stage sft was not stopped: {fault}"] if cancelled and fault else []
    assert [record.getMessage() for record in caplog.records] == told


@pytest.mark.parametrize("sealed", [True, False])
def test_a_flow_run_names_the_job_of_a_stage_that_is_not_sealed(sealed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    named: list[FollowedJob] = []
    monkeypatch.setattr(tasks, "job_of", lambda *_: JOB)
    monkeypatch.setattr(tasks, "trained", lambda *_: ANYTHING if sealed else None)
    monkeypatch.setattr(tasks, "follow", named.append)
    monkeypatch.setattr(tasks, "train", lambda *_: ANYTHING)
    assert tasks.train_stage(ANYTHING, ANYTHING, ANYTHING, ANYTHING, Resources(launch="inline")) is ANYTHING
    assert named == [JOB] * (not sealed)


CANCELLED_IN_A_DELAY = """
import os, signal, threading
from prefect import flow
from prefect.exceptions import TerminationSignal
from prefect.testing.utilities import prefect_test_harness
from prefect.utilities.engine import capture_sigterm
from flows import tasks
from vila_ops.config import Resources
from vila_ops.errors import ClusterUnreachable

class Stage:
    name = "sft"

def unreachable(stage, *_):
    print("try", flush=True)
    threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    raise ClusterUnreachable("the job server has not answered")

@flow
def cancelled():
    tasks.TASKS.train_stage(Stage(), "model", "data", "init", Resources(launch="inline"))

tasks.job_of, tasks.cancelled = (lambda *_: "the job"), (lambda: True)
tasks.stop_job = lambda job: print("stopped", job)
tasks._train_stage = tasks._task(unreachable)
with prefect_test_harness(server_startup_timeout=300), capture_sigterm():
    try:
        cancelled()
    except TerminationSignal:
        print("ended")
"""


@pytest.mark.slow
def test_a_job_is_stopped_where_its_flow_run_is_cancelled_before_another_try(tmp_path: Path) -> None:
    """Prefect waits outside of the function of a task, for minutes; see `DELAYS`."""
    command = [sys.executable, "-c", CANCELLED_IN_A_DELAY]
    env = {**os.environ, "PREFECT_HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.stdout.splitlines() == ["try", "stopped the job", "ended"], done.stderr
