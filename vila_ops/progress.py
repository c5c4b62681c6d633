"""How far a task is: one line of a terminal that is rewritten, or at most LINES lines of a log.

The line has no colour, and nothing has to be restored after it, so a killed process leaves the terminal as it was.
"""

import logging
import shutil
import sys
import time

from vila_ops import logs

LINES = 20
"""The most lines of a task that go to a log."""
REWRITE_SECONDS = 0.2
"""Shortest time between two updates of the line on a terminal."""
BAR = 20
"""Columns of the bar."""
log = logging.getLogger(__name__)


class Progress:
    """Says how many units of a task are done, and how long the rest takes at the mean pace so far."""

    def __init__(self, name: str, total: int, *, unit: str, done: int = 0) -> None:
        """`done` of the `total` units were finished before."""
        self.name, self.total, self.unit, self.first = name, total, unit, done
        self._every = max(1, -(-total // (LINES - 2)))
        self._on_terminal = sys.stderr.isatty() and not logs.as_json()
        self._shown_at = float("-inf")
        self._told: int | None = None
        self._started = time.monotonic()

    def show(self, done: int, *facts: str) -> None:
        """Tell that so many units are done, if it is time to; `facts` stand in the line, or else the mean pace."""
        now = time.monotonic()
        pace = (now - self._started) / max(1, done - self.first)
        seconds = round(pace * (self.total - done))
        told = facts or (f"{1 / max(pace, 1e-6):.3g} {self.unit}s/s",)
        after = "  ".join([*told, f"{seconds // 60}:{seconds % 60:02d} left"])
        count = f"{self.name} {self.unit} {done}/{self.total}"
        if self._on_terminal:
            if done == self.total or now - self._shown_at >= REWRITE_SECONDS:
                self._shown_at = now
                self._rewrite(f"{count}  {self._bar(done)}  {after}", last=done == self.total)
        elif self._told is None or done == self.total or done // self._every > self._told // self._every:
            self._told = done
            log.info("%s  %s", count, after)

    def _bar(self, done: int) -> str:
        full = BAR * done // self.total
        return "#" * full + "-" * (BAR - full)

    def _rewrite(self, line: str, *, last: bool) -> None:
        sys.stderr.write(f"\r{line[: shutil.get_terminal_size().columns - 1]}\x1b[K" + "\n" * last)
        sys.stderr.flush()
