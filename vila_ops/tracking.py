"""The few calls to MLflow that we make. Without a tracking URI nothing is logged and MLflow is not imported."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EXPERIMENT = "vila"


def start_run(
    tracking_uri: str | None, name: str, *, parent: str | None, params: dict[str, Any], tags: dict[str, str]
) -> str | None:
    """A new run under `parent`; returns its id."""
    if tracking_uri is None:
        return None
    client, entities = _client(tracking_uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    experiment_id = (
        experiment.experiment_id
        if experiment
        else client.create_experiment(EXPERIMENT, artifact_location=_files_beside(tracking_uri))
    )
    if parent:
        tags = {**tags, "mlflow.parentRunId": parent}
    run_id: str = client.create_run(experiment_id, run_name=name, tags=tags).info.run_id
    flat = [entities.Param(key, str(value)[:500]) for key, value in flatten(params).items()]
    for start in range(0, len(flat), 100):  # the server's limit for one call
        client.log_batch(run_id, params=flat[start : start + 100])
    return run_id


@contextmanager
def whole_run(
    tracking_uri: str | None, name: str, *, key: tuple[str, str], params: dict[str, Any], tags: dict[str, str]
) -> Iterator[str | None]:
    """The run of a whole recipe: the one tagged with `key`, opened again, or a new one; closed as it ended."""
    if tracking_uri is None:
        yield None
        return
    run_id = _find_run(tracking_uri, key)
    if run_id is None:
        run_id = start_run(tracking_uri, name, parent=None, params=params, tags=dict([key]))
    client, _ = _client(tracking_uri)
    client.update_run(run_id, status="RUNNING")
    for tag, value in tags.items():
        client.set_tag(run_id, tag, value)
    failed = True
    try:
        yield run_id
        failed = False
    finally:
        end_run(tracking_uri, run_id, failed=failed)


def _find_run(tracking_uri: str, key: tuple[str, str]) -> str | None:
    client, _ = _client(tracking_uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return None
    tag, value = key
    found = client.search_runs([experiment.experiment_id], f"tags.{tag} = '{value}'", max_results=1)
    return found[0].info.run_id if found else None


def page(tracking_uri: str | None, run_id: str | None) -> str | None:
    """The address of a run's page; None where no server shows one."""
    if not (tracking_uri and run_id and tracking_uri.startswith("http")):
        return None
    experiment = _client(tracking_uri)[0].get_run(run_id).info.experiment_id
    return f"{tracking_uri}/#/experiments/{experiment}/runs/{run_id}"


def end_run(tracking_uri: str | None, run_id: str | None, *, failed: bool) -> None:
    """Close a run."""
    if tracking_uri and run_id:
        _client(tracking_uri)[0].set_terminated(run_id, "FAILED" if failed else "FINISHED")


def log_file(tracking_uri: str | None, run_id: str | None, path: str) -> None:
    """Attach a small file to a run; never weights, which stay in the store."""
    if tracking_uri and run_id:
        _client(tracking_uri)[0].log_artifact(run_id, path)


class MetricLog:
    """Metrics of one run, sent in batches."""

    EVERY_SECONDS = 5.0

    def __init__(self, tracking_uri: str | None, run_id: str | None) -> None:
        self.tracking_uri, self.run_id = tracking_uri, run_id
        self._waiting: list[Any] = []
        self._sent = time.monotonic()

    def log(self, values: dict[str, float], *, step: int) -> None:
        """Numbers of one step; sent at the latest after EVERY_SECONDS."""
        if not (self.tracking_uri and self.run_id):
            return
        _, entities = _client(self.tracking_uri)
        now = int(time.time() * 1000)
        self._waiting += [entities.Metric(key, value, now, step) for key, value in values.items() if key != "step"]
        if time.monotonic() - self._sent > self.EVERY_SECONDS:
            self.flush()

    @classmethod
    def send(cls, tracking_uri: str | None, run_id: str | None, values: dict[str, float]) -> None:
        """Metrics that have no step, at once."""
        metrics = cls(tracking_uri, run_id)
        metrics.log(values, step=0)
        metrics.flush()

    def flush(self) -> None:
        """Send what waits."""
        if self._waiting and self.tracking_uri and self.run_id:
            client, _ = _client(self.tracking_uri)
            for start in range(0, len(self._waiting), 500):
                client.log_batch(self.run_id, metrics=self._waiting[start : start + 500])
            self._waiting.clear()
            self._sent = time.monotonic()


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings to dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _files_beside(tracking_uri: str) -> str | None:
    """Where files go with a database and no server: beside it, not into the working directory. A server decides."""
    kind, _, path = tracking_uri.partition(":///")
    return str(Path(path).resolve().parent / "mlflow-artifacts") if kind == "sqlite" else None


def _client(tracking_uri: str) -> tuple[Any, Any]:
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # standard output is for our handles
    from mlflow import MlflowClient, entities

    return MlflowClient(tracking_uri), entities
