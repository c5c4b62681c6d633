"""Heartbeats of a rank, and a watchdog that ends the process when a step hangs, after it wrote the threads' stacks.

SCRATCH/diagnostics/<address>/rank-000.heartbeat.json   what the rank is doing, written every second, removed at the end
SCRATCH/diagnostics/<address>/rank-000.stacks           the stack of each thread when a step last hung
"""

import faulthandler
import json
import logging
import os
import socket
import statistics
import threading
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, Self

from vila_ops.train.job import HUNG, RankInfo, TrainJob

TICK_SECONDS = 1.0
"""Interval between two checks of the loop, and between two writes of the heartbeat file."""
STEPS = 100
"""Number of recent steps whose median duration sets the limit."""
GRACE = 0.1
"""Share of the limit that a hung rank waits before it ends. The other ranks hang with it, and have to write their own
stacks before its end interrupts them."""
Phase = Literal["load", "train", "validate", "save", "finish"]
UNLIMITED = ("load", "finish")
"""Phases without a limit, as they read or write the whole model."""
log = logging.getLogger(__name__)


class Heartbeat(NamedTuple):
    """A sign of life from the training loop."""

    step: int
    """Number of steps done."""
    phase: Phase
    at: float
    """Time of the heartbeat, of time.monotonic()."""
    limit: float
    """Seconds until the next heartbeat after which the rank counts as hung."""
    keys: tuple[str, ...] = ()
    """Samples that the rank is processing."""


class StepWatchdog:
    """Watches the loop of one rank while inside its `with`. A thread checks every second for a new heartbeat.

    Only time in which this process could run is counted, so a process that was suspended (Ctrl-Z, a debugger) goes on.
    A call that never releases the interpreter's lock stops the thread too; then the other ranks detect the hang.
    """

    def __init__(self, job: TrainJob, rank_info: RankInfo) -> None:
        self.rank_info = rank_info
        self.stage = job.stage.name
        self.folder = job.diagnostics()
        self._limits = job.resources.train.watchdog
        self._step_seconds: deque[float] = deque(maxlen=STEPS)
        self._heartbeat = Heartbeat(0, "load", time.monotonic(), float("inf"))
        self.metrics: dict[str, float] = {}
        """The newest metrics of the loop, which the heartbeat file has too."""
        self._alive = 0.0
        """Time of the last `alive`, of time.monotonic()."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        try:
            self._heartbeat_file().unlink(missing_ok=True)
        except OSError as error:  # of a disk that has turned read-only; the stage's own error says more
            log.warning("rank %d could not remove its heartbeat: %s", self.rank_info.rank, error)

    def heartbeat(self, step: int, phase: Phase) -> None:
        """Signal that the rank begins a phase after `step` steps, or has made progress in it."""
        now = time.monotonic()
        if self._heartbeat.phase == "train":
            self._step_seconds.append(now - self._heartbeat.at)
        longest = self._limits.factor * statistics.median(self._step_seconds) if self._step_seconds else 0.0
        limit = float("inf") if phase in UNLIMITED else max(self._limits.at_least_seconds, longest)
        self._heartbeat = Heartbeat(step, phase, now, limit)

    def alive(self) -> None:
        """Signal progress within a phase: the limit counts from here, while the duration of the step goes on.

        So a step that reads many shards for the first time, each compared with its sha256, is not taken for hung.
        """
        self._alive = time.monotonic()

    def set_samples(self, keys: tuple[str, ...]) -> None:
        """Set the samples of the micro-batch that this rank computes."""
        self._heartbeat = self._heartbeat._replace(keys=keys)

    def _watch(self) -> None:
        """Write the heartbeat file, and end the process when the limit is exceeded; the thread runs this."""
        last, seen, waited = time.monotonic(), (self._heartbeat.at, self._alive), 0.0
        while not self._ended.wait(TICK_SECONDS):
            now, heartbeat = time.monotonic(), self._heartbeat
            passed, last = min(now - last, 2 * TICK_SECONDS), now
            now_seen = (heartbeat.at, self._alive)
            waited, seen = waited + passed if now_seen == seen else 0.0, now_seen
            self._write_heartbeat(heartbeat, waited)
            if waited > heartbeat.limit:
                self._end(heartbeat, waited)

    def _write_heartbeat(self, heartbeat: Heartbeat, waited: float) -> None:
        status = {
            "time": time.time(), "step": heartbeat.step, "phase": heartbeat.phase, "seconds_in_phase": round(waited, 1),
            "pid": os.getpid(), "host": socket.gethostname(),
            "metrics": {name: float(value) for name, value in self.metrics.items()},
        }  # fmt: skip
        draft = self._heartbeat_file().with_suffix(".draft")
        try:
            draft.write_text(json.dumps(status))
            draft.replace(self._heartbeat_file())
        except OSError as error:
            log.warning("rank %d could not write its heartbeat: %s", self.rank_info.rank, error)

    def _end(self, heartbeat: Heartbeat, waited: float) -> None:
        """Write the stack of every thread, give the other ranks time to do so, and end the process.

        An exception would not end it: the loop waits in a call that never returns to Python.
        """
        message = (
            f"{self.stage}: rank {self.rank_info.rank} of {self.rank_info.world_size} hangs in phase {heartbeat.phase} "
            f"after step {heartbeat.step}: no heartbeat for {waited:.0f} s, the limit is {heartbeat.limit:.0f} s "
            f"(watchdog.factor {self._limits.factor:g} times the median step, at least watchdog.at_least_seconds "
            f"{self._limits.at_least_seconds:g}). This process ends with code {HUNG}; the next try resumes from the "
            f"last checkpoint. Its samples: {list(heartbeat.keys)}"
        )
        try:
            self._write_stacks(message)
        except OSError as error:  # steps also hang because a disk is full or gone
            log.error("%s; the stacks could not be written: %s", message, error)
        finally:
            time.sleep(max(TICK_SECONDS * 2, GRACE * heartbeat.limit))
            os._exit(HUNG)

    def _write_stacks(self, message: str) -> None:
        path = self.folder / f"rank-{self.rank_info.rank:03d}.stacks"
        with path.open("w") as file:
            file.write(f"{message}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        log.error("%s: %s", path, path.read_text())

    def _heartbeat_file(self) -> Path:
        return heartbeat_file(self.folder, self.rank_info.rank)


def heartbeat_file(folder: Path, rank: int) -> Path:
    """The file of a rank's heartbeat in a stage's diagnostics."""
    return folder / f"rank-{rank:03d}.heartbeat.json"
