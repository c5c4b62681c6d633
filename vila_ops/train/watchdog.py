"""Whether a rank still moves: it says so in a file, and a step that hangs ends the process, its stacks written down.

SCRATCH/watch/<address>/rank-000.json     what a rank is doing, written anew every second; gone when it has ended
SCRATCH/watch/<address>/rank-000.stacks   where each thread of a rank stood when a step hung last
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
"""Between two looks at a rank, and between two writings of its file."""
STEPS = 100
"""Of which the median is taken."""
GRACE = 0.1
"""Of the bound, before a hung rank ends: the others hang with it, and its end would break off what they hang in."""
Phase = Literal["load", "train", "validate", "save", "finish"]
UNBOUND = ("load", "finish")
"""Phases that take as long as a model takes to be read and written."""
log = logging.getLogger(__name__)


class Heartbeat(NamedTuple):
    """A sign of life."""

    step: int
    """Steps that are done."""
    phase: Phase
    at: float
    """time.monotonic()"""
    limit: float
    """Seconds until the next beat after which the rank counts as hung."""
    keys: tuple[str, ...] = ()
    """Samples that the rank is at."""


class StepWatchdog:
    """Of one rank, inside its `with`. A thread looks once a second whether the loop has given another beat.

    Only time in which this process could run is counted, so that one that was stopped (Ctrl-Z, a debugger) goes on. A
    call that never gives up the interpreter's lock stops the thread as well; the other ranks then see the hang.
    """

    def __init__(self, job: TrainJob, place: RankInfo) -> None:
        self.place = place
        self.name = job.stage.name
        self.folder = job.watch()
        self._rule = job.resources.train.watchdog
        self._took: deque[float] = deque(maxlen=STEPS)
        self._beat = Heartbeat(0, "load", time.monotonic(), float("inf"))
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        self._said().unlink(missing_ok=True)

    def beat(self, step: int, phase: Phase) -> None:
        """The rank begins a phase after `step` steps, or has got on in it."""
        now = time.monotonic()
        if self._beat.phase == "train":
            self._took.append(now - self._beat.at)
        longest = self._rule.factor * statistics.median(self._took) if self._took else 0.0
        limit = float("inf") if phase in UNBOUND else max(self._rule.at_least_seconds, longest)
        self._beat = Heartbeat(step, phase, now, limit)

    def reads(self, keys: tuple[str, ...]) -> None:
        """The samples that this rank has of the step."""
        self._beat = self._beat._replace(keys=keys)

    def _look(self) -> None:
        """The thread: says what the rank is doing, and ends the process when that takes too long."""
        last, seen, waited = time.monotonic(), self._beat.at, 0.0
        while not self._ended.wait(TICK_SECONDS):
            now, beat = time.monotonic(), self._beat
            passed, last = min(now - last, 2 * TICK_SECONDS), now
            waited, seen = waited + passed if beat.at == seen else 0.0, beat.at
            self._say(beat, waited)
            if waited > beat.limit:
                self._end(beat, waited)

    def _say(self, beat: Heartbeat, waited: float) -> None:
        said = {
            "time": time.time(), "step": beat.step, "phase": beat.phase, "seconds_in_phase": round(waited, 1),
            "pid": os.getpid(), "host": socket.gethostname(),
        }  # fmt: skip
        draft = self._said().with_suffix(".draft")
        try:
            draft.write_text(json.dumps(said))
            draft.replace(self._said())
        except OSError as error:
            log.warning("rank %d could not say that it lives: %s", self.place.rank, error)

    def _end(self, beat: Heartbeat, waited: float) -> None:
        """Write down where every thread stands, give the other ranks time to do so, and end the process.

        Not by an exception: the loop waits in a call that never returns to Python.
        """
        head = (
            f"{self.name}: rank {self.place.rank} of {self.place.world_size} hangs in phase {beat.phase} after step "
            f"{beat.step}: no sign of life for {waited:.0f} s, where {beat.limit:.0f} s are the most (watchdog.factor "
            f"{self._rule.factor:g} times the median step, at least watchdog.at_least_seconds "
            f"{self._rule.at_least_seconds:g}). This process ends with code {HUNG}; the last resume checkpoint is what "
            f"the next try goes on from. Its samples: {list(beat.keys)}"
        )
        try:
            self._write_stacks(head)
        except OSError as error:  # where a disk is full or gone, steps hang
            log.error("%s; where its threads stand could not be written: %s", head, error)
        finally:
            time.sleep(max(TICK_SECONDS * 2, GRACE * beat.limit))
            os._exit(HUNG)

    def _write_stacks(self, head: str) -> None:
        path = self._stacks()
        with path.open("w") as file:
            file.write(f"{head}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        log.error("%s: %s", path, path.read_text())

    def _said(self) -> Path:
        return self.folder / f"rank-{self.place.rank:03d}.json"

    def _stacks(self) -> Path:
        return self.folder / f"rank-{self.place.rank:03d}.stacks"
