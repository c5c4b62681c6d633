"""How far a task is: few lines in a log, one line on a terminal."""

import contextlib
import logging
import os
import pty
import re
import sys
from types import SimpleNamespace

import pytest

from vila_ops.progress import BAR, LINES, Progress


def on_terminal(progress_of: str, total: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """All that a terminal of so many columns receives of a task that counts to its end."""
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", terminal)
        patched.setenv("COLUMNS", str(columns))
        progress = Progress(progress_of, total, unit="step")
        for done in range(1, total + 1):
            progress.show(done, "loss 2.500")
    written = ""
    with contextlib.suppress(OSError):  # Linux raises it at the end of a terminal
        while piece := os.read(ours, 2**16):
            written += piece.decode()
    os.close(ours)
    return written


@pytest.mark.parametrize("total", [1, 2, 18, 19, 39, 1000])
def test_a_log_gets_few_lines_among_them_the_first_and_the_last(total: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    progress = Progress("align", total, unit="step")
    for done in range(1, total + 1):
        progress.show(done, "loss 2.500")
    lines = [record.message for record in caplog.records if record.name == "vila_ops.progress"]
    assert lines[0].startswith(f"align step 1/{total}  loss 2.500  ")
    assert lines[-1].startswith(f"align step {total}/{total}  ")
    assert lines[-1].endswith("0:00 left")
    assert min(total, LINES / 2) <= len(lines) <= LINES


def test_a_task_that_counts_in_leaps_tells_its_pace_and_begins_where_it_was(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 100 of 1,000: 300 more in 60 seconds are 5 a second, and the last 600 take 120 seconds."""
    clock = iter([0.0, 60.0, 180.0])
    monkeypatch.setattr("vila_ops.progress.time", SimpleNamespace(monotonic=lambda: next(clock)))
    caplog.set_level(logging.INFO)
    progress = Progress("cider", 1000, unit="request", done=100)
    for done in (400, 1000):
        progress.show(done)
    assert [record.message for record in caplog.records] == [
        "cider request 400/1000  5 requests/s  2:00 left",
        "cider request 1000/1000  5 requests/s  0:00 left",
    ]


def test_a_terminal_gets_one_line_that_is_rewritten(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    written = on_terminal("align", 500, 60, monkeypatch)
    states = written.split("\r")
    assert written.count("\n") == 1
    assert written.endswith("\n")
    assert states[1].startswith(f"align step 1/500  {'-' * BAR}  loss 2.500")
    assert any(state.startswith(f"align step 500/500  {'#' * BAR}  loss 2.500") for state in states)
    assert all(len(state.removesuffix("\x1b[K")) < 60 for state in states)
    assert len(states) < 100
    assert caplog.records == []


def test_the_line_has_no_colour_and_hides_no_cursor(monkeypatch: pytest.MonkeyPatch) -> None:
    """So NO_COLOR has nothing to take away, and a killed process leaves the terminal as it was."""
    codes = set(re.findall(r"\x1b\[[0-9;?]*[A-Za-z]", on_terminal("align", 3, 80, monkeypatch)))
    assert codes == {"\x1b[K"}
