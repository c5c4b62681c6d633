"""The few calls to MLflow that we make. Without a tracking URI nothing is logged and MLflow is not imported."""

import time
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
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(EXPERIMENT)
    if parent:
        tags = {**tags, "mlflow.parentRunId": parent}
    run_id: str = client.create_run(experiment_id, run_name=name, tags=tags).info.run_id
    flat = [entities.Param(key, str(value)[:500]) for key, value in flatten(params).items()]
    for start in range(0, len(flat), 100):  # the server's limit for one call
        client.log_batch(run_id, params=flat[start : start + 100])
    return run_id


def find_run(tracking_uri: str, *, tag: tuple[str, str]) -> str | None:
    """The newest run with this tag."""
    client, _ = _client(tracking_uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return None
    key, value = tag
    found = client.search_runs([experiment.experiment_id], f"tags.{key} = '{value}'", max_results=1)
    return found[0].info.run_id if found else None


def end_run(tracking_uri: str | None, run_id: str | None, *, failed: bool) -> None:
    """Close a run."""
    if tracking_uri and run_id:
        _client(tracking_uri)[0].set_terminated(run_id, "FAILED" if failed else "FINISHED")


def log_file(tracking_uri: str | None, run_id: str | None, path: str) -> None:
    """Attach a small file to a run; never weights, which stay in the store."""
    if tracking_uri and run_id:
        _client(tracking_uri)[0].log_artifact(run_id, path)


def set_tags(tracking_uri: str | None, run_id: str | None, tags: dict[str, str]) -> None:
    """Tag a run."""
    if tracking_uri and run_id:
        client, _ = _client(tracking_uri)
        for key, value in tags.items():
            client.set_tag(run_id, key, value)


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


def _client(tracking_uri: str) -> tuple[Any, Any]:
    from mlflow import MlflowClient, entities

    return MlflowClient(tracking_uri), entities
