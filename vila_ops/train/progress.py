"""How far a stage is, for the process that holds its lease: what the heartbeat of rank 0 says, wherever rank 0 runs."""

import json
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from vila_ops.artifacts.progress import ProgressRecord
from vila_ops.config import Resources, Stage
from vila_ops.train.watchdog import heartbeat_file

NUM_STEPS, FIRST_STEP, FIRST_AT, CHECKPOINT = "num_steps", "first_step", "first_step_at", "ckpt/saved_at"
"""What a heartbeat has beside the metrics of a step: the steps of the stage, those that were done when these workers
began to train, the time of that, and the time at which they last sealed a resume checkpoint."""


class StageReport:
    """The report of a stage's lease."""

    def __init__(self, stage: Stage, resources: Resources, diagnostics: Path) -> None:
        now = time.time()
        self._file = heartbeat_file(diagnostics, 0)
        self._told = ProgressRecord(
            task="train_stage", name=stage.name, host=socket.gethostname(), began=now, advanced=now, unit="steps",
            workers=resources.train.num_workers, price_per_hour=resources.train.price_per_hour(),
        )  # fmt: skip

    def __call__(self) -> ProgressRecord:
        """The record of the newest heartbeat; between two attempts of the workers it is the last one."""
        with suppress(OSError, ValueError, KeyError, TypeError):  # it is not there yet or no longer, or it is damaged
            self._told = self._told.with_changes(self._changes(json.loads(self._file.read_bytes())))
        return self._told

    def end(self, steps: int) -> None:
        """All steps are done."""
        self._told = self._told.with_changes({"done": steps, "total": steps, "advanced": time.time()})

    def _changes(self, status: dict[str, Any]) -> dict[str, Any]:
        if status["time"] < self._told.began:  # of an attempt that was killed
            return {}
        metrics: dict[str, float] = status["metrics"]
        changes = {
            "host": status["host"],
            "advanced": max(self._told.began, status["time"] - status["seconds_in_phase"]),
            "metrics": {**self._told.metrics, **metrics},
        }
        if NUM_STEPS not in metrics:  # workers load; if they replace others, those had counted
            return changes
        if self._told.resumed_at is None:
            changes |= {"resumed": metrics[FIRST_STEP], "resumed_at": metrics[FIRST_AT]}
        return {**changes, "done": status["step"], "total": metrics[NUM_STEPS]}
