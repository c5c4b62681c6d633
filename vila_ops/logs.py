"""Lines of the log: text for people, or one JSON object a line where VILA_LOG is `json`.

A JSON line has the ids of what its process works on, so that lines of many processes can be put together: flow run,
MLflow run, task, stage, address, rank, request.
"""

import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import TextIO

VARIABLE = "VILA_LOG"
REQUEST: ContextVar[str | None] = ContextVar("request", default=None)
"""Id of the request that is answered."""
_working: list[dict[str, str | int]] = []
"""Ids of what this process works on, the innermost last. Pieces of work in several threads may end in any order."""


def as_json() -> bool:
    """Whether lines are JSON. Raises ValueError."""
    form = os.environ.get(VARIABLE, "text")
    if form not in ("text", "json"):
        raise ValueError(f"{VARIABLE} is {form!r}, but may be text or json")
    return form == "json"


def configure(stream: TextIO, *, text: str, level: int = logging.WARNING, force: bool = False) -> None:
    """Send this process's log to a stream, as JSON or in the form `text` of the logging module.

    `level` is that of other packages; ours is INFO. A log that goes somewhere already stays there without `force`.
    Raises ValueError.
    """
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter() if as_json() else logging.Formatter(text))
    logging.basicConfig(level=level, handlers=[handler], force=force)
    logging.getLogger("vila_ops").setLevel(logging.INFO)


def adopt() -> None:
    """Make the log JSON that another program, such as Prefect, has set up for this process, where that is asked for."""
    if as_json():
        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonFormatter())


def environment() -> dict[str, str]:
    """The variables by which a process elsewhere writes lines as this one does."""
    return {VARIABLE: os.environ[VARIABLE]} if VARIABLE in os.environ else {}


@contextmanager
def working_on(**ids: str | int | None) -> Iterator[None]:
    """Give the JSON lines of this process these ids while the body runs, whichever thread writes them."""
    own = {name: value for name, value in ids.items() if value is not None}
    _working.append(own)
    try:
        yield
    finally:
        _working.remove(own)


class JsonFormatter(logging.Formatter):
    """One JSON object for each record."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        line: dict[str, str | int] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        for ids in tuple(_working):
            line |= ids
        if request := REQUEST.get():
            line["request"] = request
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
