"""MLflow of a test's own, on a server that is killed and comes back or in a file, and what it was told."""

import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric

from vila_ops import tracking
from vila_ops.config import Resources
from vila_ops.local import servers


def tracked(folder: Path, uri: str | None) -> Resources:
    """Resources with a store in the folder."""
    return Resources(launch="inline").with_changes({"storage.store": f"{folder}/store", "tracking.uri": uri})


def begin(resources: Resources) -> str:
    run_id = tracking.start_run(resources, "align", parent=None, params={"a": {"b": 1}}, tags={"task": "train_stage"})
    assert run_id is not None
    return run_id


def history(resources: Resources, run_id: str, name: str = "loss") -> list[Metric]:
    """In the order in which they were logged."""
    assert resources.tracking.uri is not None
    found = MlflowClient(resources.tracking.uri).get_metric_history(run_id, name)
    return sorted(found, key=lambda metric: (metric.timestamp, metric.step))


def kept(resources: Resources) -> list[Path]:
    return sorted((resources.storage.scratch() / "metrics").glob("*"))


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 1200
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@dataclass
class Server:
    """MLflow's server, on the same database and port each time."""

    told: servers.Server
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self) -> None:
        self.started.append(subprocess.Popen(self.told.command, env={**os.environ, **self.told.env}))
        until(lambda: self.told.healthy(self.started[-1].pid, 1.0))

    def kill(self) -> None:
        self.started[-1].kill()
        self.started[-1].wait()
