"""The servers' logs below root/logs: how one begins, its last lines, and new ones as they come."""

import os
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, closing
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import BinaryIO

from vila_ops.local.log_writer import KEPT

POLL_SECONDS = 0.2
WRITER = Path(__file__).with_name("log_writer.py")
"""What a log is written by; Python runs it as a file."""


def begin(log: Path) -> None:
    """Make an empty log, and keep the one that is there as an earlier file of it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists():
        RotatingFileHandler(log, backupCount=KEPT, delay=True).doRollover()
    os.close(os.open(log, os.O_WRONLY | os.O_CREAT, 0o600))


def lines_of(log: Path, *, last: int) -> Generator[str | None, None, None]:
    """Endless: the last lines of a log, then those that are appended to it; None whenever there is none yet."""
    kept = deque(_earlier_lines(log) if last else (), maxlen=last)
    file, rest = _opened(log), b""
    begins = True
    try:
        while True:
            if file is None:
                file = _opened(log)
            if file is not None:
                rest += file.read()
                if not _is_current(file, log):  # it is complete, and the next one may have lines already
                    rest += file.read()
                    file.close()
                    file = None
            *whole, rest = rest.split(b"\n")
            lines = [line.decode(errors="replace") for line in whole]
            if begins:
                kept.extend(lines)
                lines, begins = list(kept), False
            yield from lines
            yield None
    finally:
        if file is not None:
            file.close()


def follow(logs: Mapping[str, Path], *, last: int) -> Iterator[tuple[str, str]]:
    """Endless: name and line of the last lines of each log, then of those that are appended to any."""
    with ExitStack() as stack:
        streams = {name: stack.enter_context(closing(lines_of(log, last=last))) for name, log in logs.items()}
        while True:
            for name, lines in streams.items():
                yield from ((name, line) for line in iter(lines.__next__, None))
            time.sleep(POLL_SECONDS)


def last_lines(log: Path, count: int) -> list[str]:
    """The last lines of a log, of its earlier files too."""
    with closing(lines_of(log, last=count)) as lines:
        return list(iter(lines.__next__, None))


def _earlier_lines(log: Path) -> Iterator[str]:
    for number in range(KEPT, 0, -1):
        path = log.with_name(f"{log.name}.{number}")
        if path.is_file():
            yield from path.read_text(errors="replace").removesuffix("\n").split("\n")


def _opened(log: Path) -> BinaryIO | None:
    try:
        return log.open("rb")
    except FileNotFoundError:
        return None


def _is_current(file: BinaryIO, log: Path) -> bool:
    """Whether an opened file is still the one of its name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), log.stat())
    except FileNotFoundError:
        return False
