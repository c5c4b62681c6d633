"""The task `train_stage` when its flow run is ended, without Prefect's server and without a cluster."""

import logging
import signal
from typing import Any

import pytest
from prefect.exceptions import TerminationSignal

from flows import tasks
from vila_ops.config import Resources
from vila_ops.errors import ClusterUnreachable


@pytest.mark.parametrize(
    "fault", [ClusterUnreachable("`ray job stop ID` ends it"), ValueError("the job server asks for a token"), None]
)
@pytest.mark.parametrize("cancelled", [True, False])
def test_a_job_that_cannot_be_stopped_leaves_the_signal_as_it_is(
    cancelled: bool, fault: Exception | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Prefect would try the task again after another error, and follow the job of a cancelled flow run."""
    asked: list[str] = []

    class Stage:
        name = "sft"

    def train_stage(*_: Any) -> None:
        raise TerminationSignal(signal.SIGTERM)

    def stop_stage(stage: Stage, *_: Any) -> None:
        asked.append(stage.name)
        if fault is not None:
            raise fault

    monkeypatch.setattr(tasks, "train_stage", train_stage)
    monkeypatch.setattr(tasks, "stop_stage", stop_stage)
    monkeypatch.setattr(tasks, "cancelled", lambda: cancelled)
    anything: Any = Stage()
    with caplog.at_level(logging.ERROR, "vila_ops"), pytest.raises(TerminationSignal):
        tasks.train_or_stop(anything, anything, anything, anything, Resources(launch="inline"))
    assert asked == ["sft"] * cancelled
    told = [f"the job of stage sft was not stopped: {fault}"] if cancelled and fault else []
    assert [record.getMessage() for record in caplog.records] == told
