"""An MLflow that answers soon, and one that is away."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tracking.live import tracked
from vila_ops.config import Resources
from vila_ops.tracking import outbox


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "SEND_SECONDS", 0.1)
    monkeypatch.setattr(outbox, "RETRY_SECONDS", 0.1)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture
def resources(tmp_path: Path, empty_database: Path) -> Resources:
    shutil.copyfile(empty_database, tmp_path / "mlflow.db")
    return tracked(tmp_path, f"sqlite:///{tmp_path}/mlflow.db")


@pytest.fixture
def away(resources: Resources, free_ports: Callable[[int], list[int]], monkeypatch: pytest.MonkeyPatch) -> Resources:
    """The same place, but the server, which asks for a password, does not answer."""
    (port,) = free_ports(1)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "u")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    return resources.with_changes({"tracking.uri": f"http://127.0.0.1:{port}"})
