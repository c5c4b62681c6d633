"""The servers of this machine as recorded processes: started, found again, and ended."""

import fcntl
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from vila_ops.config.base import Config
from vila_ops.config.local import LocalServers
from vila_ops.errors import CorruptArtifact
from vila_ops.processes import ProcessId, spawn, stop

Name = Literal["mlflow", "prefect", "ray", "worker", "sweeper"]
NAMES: tuple[Name, ...] = ("mlflow", "prefect", "ray", "worker", "sweeper")
log = logging.getLogger(__name__)


class ProcessRecord(Config):
    """A server that `up` started, as recorded in root/pids/NAME.json."""

    name: Name
    pid: int
    started: float
    """Start time of the process, see `ProcessId`."""
    command: tuple[str, ...]
    env: dict[str, str]
    directory: str
    """Working directory, since two checkouts may not share one root."""

    def process(self) -> ProcessId:
        """The server's first process, the leader of its session."""
        return ProcessId(self.pid, self.started)


def start(root: Path, name: Name, command: tuple[str, ...], env: dict[str, str]) -> ProcessRecord:
    """Start a server and record it; the log of its last process is kept beside the new one."""
    logs = root / "logs"
    logs.mkdir(exist_ok=True)
    log = logs / f"{name}.log"
    if log.exists():
        log.replace(logs / f"{name}.last.log")
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    process = spawn(command, env={**os.environ, "PATH": path, **env}, log=log)
    record = ProcessRecord(
        name=name, pid=process.pid, started=process.started, command=command, env=env, directory=str(Path.cwd())
    )
    write_private(record_path(root, name), record.model_dump_json(indent=2))
    return record


def end(settings: LocalServers, record: ProcessRecord) -> None:
    """End a recorded server and everything that it started, and remove its record. Raises TimeoutError."""
    began = time.monotonic()
    stop(record.process(), grace_seconds=settings.stop_grace_seconds)
    record_path(root_of(settings), record.name).unlink(missing_ok=True)
    log.info("%s: ended after %.1f s", record.name, time.monotonic() - began)


def root_of(settings: LocalServers) -> Path:
    """The absolute path of the servers' folder."""
    return Path(settings.root).expanduser().absolute()


@contextmanager
def lock(root: Path) -> Iterator[None]:
    """Admit one `up` or `down` of a root at a time. The kernel frees the lock when its holder ends."""
    (root / "pids").mkdir(parents=True, exist_ok=True)
    with (root / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def record_path(root: Path, name: Name) -> Path:
    """The file of a server's record."""
    return root / "pids" / f"{name}.json"


def read_record(root: Path, name: Name) -> ProcessRecord | None:
    """The record of a server; None if `up` did not start it. Raises CorruptArtifact."""
    path = record_path(root, name)
    try:
        return ProcessRecord.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise CorruptArtifact(
            f"{path} is not the record of a server; end the {name} server, if it runs, remove this file and run again"
        ) from error


def write_private(path: Path, text: str) -> None:
    """Write a file whole or not at all, readable by its owner alone."""
    draft = path.with_suffix(".draft")
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    draft.replace(path)


def tail(root: Path, name: Name) -> str:
    """The last 30 lines of a server's log, under a headline."""
    path = root / "logs" / f"{name}.log"
    lines = path.read_text(errors="replace").splitlines()[-30:]
    return "\n".join([f"the end of {path}:", *lines])
