"""A rank as of one_rank.py, but rank 1 hangs after AFTER steps: `python hung_rank.py HOW JOB.json RANK ...`.

HOW is `suspended` (the process stops itself) or `sleeps`. A step has no limit before that, however busy the machine is.
"""

import os
import signal
import sys
import time
from typing import Any

from one_rank import main

from vila_ops.train import loop
from vila_ops.train.batch_loader import BatchLoader
from vila_ops.train.watchdog import Phase, StepWatchdog

AFTER = 2


def sleeps_for_ever() -> None:
    time.sleep(3600)


class Stuck(BatchLoader):
    """Hangs in the step after AFTER steps, after its first micro-batch."""

    def train(self, step: int) -> Any:
        for loaded in super().train(step):
            yield loaded
            if step > AFTER:
                os.kill(os.getpid(), signal.SIGSTOP) if sys.argv[1] == "suspended" else sleeps_for_ever()


class LatelyImpatient(StepWatchdog):
    """Has no limit before the step that hangs."""

    def heartbeat(self, step: int, phase: Phase) -> None:
        super().heartbeat(step, phase)
        if step < AFTER:
            self._heartbeat = self._heartbeat._replace(limit=float("inf"))


if __name__ == "__main__":
    loop.StepWatchdog = LatelyImpatient  # type: ignore[misc]
    if sys.argv[3] == "1":
        loop.BatchLoader = Stuck  # type: ignore[misc]
    main(*sys.argv[2:])
