"""How far a task is: the record that the holder of its lease stores with each heartbeat. `top` and /metrics read it."""

import socket
import time
from collections.abc import Mapping

from vila_ops.config import Config


class ProgressRecord(Config):
    """How far one attempt at a task is."""

    task: str
    """`prepare`, `train_stage`, ...; `flow` for a flow run."""
    name: str
    """Of the mixture, the stage, the benchmark, ..."""
    host: str
    """Where it works; of training, where rank 0 does."""
    began: float
    """Start of the attempt, in seconds since 1970, as are all times here."""
    advanced: float
    """Time of the last progress."""
    done: float = 0.0
    total: float | None = None
    """None where nothing is counted."""
    unit: str = ""
    """What is counted, such as `steps`."""
    resumed: float = 0.0
    """`done` when the attempt began."""
    resumed_at: float | None = None
    """When its counting began, after data and model were loaded; None before."""
    workers: int = 1
    price_per_hour: float | None = None
    """Of all accelerators together; None where no price is known."""
    metrics: dict[str, float] = {}
    """The newest values by their names in MLflow."""


class Reporter:
    """How far a task of this process is; the report of a lease."""

    def __init__(
        self, task: str, name: str, *, unit: str = "", workers: int = 1, price_per_hour: float | None = None
    ) -> None:
        now = time.time()
        self.told = ProgressRecord(
            task=task, name=name, host=socket.gethostname(), began=now, advanced=now, unit=unit, workers=workers,
            price_per_hour=price_per_hour,
        )  # fmt: skip

    def __call__(self) -> ProgressRecord:
        """The newest record."""
        return self.told

    def begin(self, done: float, total: float) -> None:
        """Say how much was done before this attempt."""
        self.told = self.told.with_changes({"done": done, "total": total, "resumed": done, "resumed_at": time.time()})

    def advance(self, done: float, metrics: Mapping[str, float] | None = None) -> None:
        """Say how much is done."""
        changes = {"done": done, "advanced": time.time(), "metrics": dict(metrics or {})}
        self.told = self.told.with_changes(changes)
