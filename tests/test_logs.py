"""Lines of the log as JSON, with the ids of what a process works on."""

import io
import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from vila_ops import logs

ROOT = Path(__file__).parents[1]


log = logging.getLogger("vila_ops.some.module")
Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def written() -> Iterator[Lines]:
    """The JSON lines of the logger above."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.JsonFormatter())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    log.removeHandler(handler)


def test_a_line_has_time_level_place_and_the_ids_of_the_work(written: Lines) -> None:
    with logs.working_on(task="train_stage", stage="align", mlflow_run=None):
        with logs.working_on(rank=1):
            thread = threading.Thread(target=log.warning, args=("%d steps\nare done", 3))
            thread.start()
            thread.join()
        log.info("inner")
    log.info("outer")
    first, inner, outer = written()
    assert datetime.fromisoformat(first.pop("time")).utcoffset() is not None
    assert first == {
        "level": "warning", "logger": "vila_ops.some.module", "message": "3 steps\nare done",
        "host": socket.gethostname(), "pid": os.getpid(), "task": "train_stage", "stage": "align", "rank": 1,
    }  # fmt: skip
    assert (inner["stage"], "rank" in inner) == ("align", False)
    assert "stage" not in outer


def test_work_that_ends_before_work_inside_of_it_leaves_no_id(written: Lines) -> None:
    """As in two threads."""
    outer, inner = logs.working_on(stage="align"), logs.working_on(stage="sft")
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    log.info("one")
    inner.__exit__(None, None, None)
    log.info("none")
    one, none = written()
    assert (one["stage"], "stage" in none) == ("sft", False)


def test_a_line_has_the_request_and_the_traceback(written: Lines) -> None:
    token = logs.REQUEST.set("r-1")
    try:
        raise ValueError("not ours")
    except ValueError:
        log.exception("it failed")
    finally:
        logs.REQUEST.reset(token)
    log.info("later")
    failed, later = written()
    assert failed["request"] == "r-1"
    assert failed["exception"].startswith("Traceback")
    assert failed["exception"].endswith("ValueError: not ours")
    assert "request" not in later


@pytest.mark.parametrize("form", ["json", "text", "xml"])
def test_the_program_writes_what_is_asked_for(form: str) -> None:
    env = {**os.environ, "VILA_LOG": form, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "vila_ops", "metrics", "--listen", "9464"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    if form == "json":
        (line,) = [json.loads(line) for line in done.stderr.splitlines()]
        assert (line["level"], line["message"][:17]) == ("error", "--listen '9464' i")
    else:
        expected = "error: --listen '9464' is not" if form == "text" else "error: VILA_LOG is 'xml', but may be text or"
        assert done.stderr.startswith(expected)
