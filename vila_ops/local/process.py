"""The servers of this machine as recorded processes: started, found again, and ended."""

import fcntl
import logging
import os
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from vila_ops.config.base import Config, fingerprint
from vila_ops.config.local import LocalServers
from vila_ops.errors import CorruptArtifact, did_you_mean
from vila_ops.local.logs import WRITER, begin
from vila_ops.processes import ProcessId, spawn, stop
from vila_ops.tracking.outbox import shown

Name = Literal["mlflow", "prefect", "ray", "worker", "sweeper"]
NAMES: tuple[Name, ...] = ("mlflow", "prefect", "ray", "worker", "sweeper")
SECRETS = (
    *("MLFLOW_TRACKING_PASSWORD", "MLFLOW_AUTH_ADMIN_PASSWORD", "_MLFLOW_SERVER_FILE_STORE"),
    *("PREFECT_API_AUTH_STRING", "PREFECT_SERVER_API_AUTH_STRING", "PREFECT_SERVER_DATABASE_CONNECTION_URL"),
)
"""Variables of servers with secrets in them."""
RESTORING = "restoring.txt"
"""File in the servers' folder while a backup is restored: the name of its snapshot."""
log = logging.getLogger(__name__)


class ProcessRecord(Config):
    """A server that `up` started, as recorded in root/pids/NAME.json."""

    name: Name
    pid: int
    started: float
    """Start time of the process, see `ProcessId`."""
    command: tuple[str, ...]
    env: dict[str, str]
    """Its own variables, see `recorded`."""
    directory: str
    """Working directory, since two checkouts may not share one root."""
    log_writer: ProcessId | None = None
    """The process that writes its log; None: a version without one started it."""

    def process(self) -> ProcessId:
        """The server's first process, the leader of its session."""
        return ProcessId(self.pid, self.started)


def recorded(env: dict[str, str]) -> dict[str, str]:
    """The variables of a server as its record has them: of a secret only a digest, which tells that it changed."""
    return {name: fingerprint(value) if name in SECRETS else value for name, value in env.items()}


def start(
    settings: LocalServers, name: Name, command: tuple[str, ...], env: dict[str, str], fresh: Mapping[str, str]
) -> ProcessRecord:
    """Start a server and record it. Its log begins empty. `fresh` are variables that differ at each start."""
    root = root_of(settings)
    begin(log_of(root, name))
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    output, written = os.pipe()
    try:
        write = (sys.executable, "-I", "-S", str(WRITER), str(log_of(root, name)), str(settings.log_bytes))
        writer = spawn(write, env={}, log=Path(os.devnull), stdin=output)
        process = spawn(command, env={**os.environ, "PATH": path, **env, **fresh}, log=written)
    finally:
        os.close(output)
        os.close(written)
    record = ProcessRecord(
        name=name, pid=process.pid, started=process.started, command=command, env=recorded(env),
        directory=str(Path.cwd()), log_writer=writer,
    )  # fmt: skip
    write_private(record_path(root, name), record.model_dump_json(indent=2))
    return record


def end(settings: LocalServers, record: ProcessRecord) -> None:
    """End a recorded server and everything that it started, and remove its record. Raises TimeoutError."""
    began = time.monotonic()
    stop(record.process(), grace_seconds=settings.stop_grace_seconds)
    if record.log_writer is not None:  # it ends by itself once it has written all
        stop(record.log_writer, grace_seconds=settings.stop_grace_seconds)
    record_path(root_of(settings), record.name).unlink(missing_ok=True)
    log.info("%s: ended after %.1f s", record.name, time.monotonic() - began)


def root_of(settings: LocalServers) -> Path:
    """The absolute path of the servers' folder."""
    return Path(settings.root).expanduser().absolute()


@contextmanager
def lock(root: Path) -> Iterator[None]:
    """Admit one `up`, `down` or `restore` of a root at a time. The kernel frees the lock when its holder ends."""
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


def log_of(root: Path, name: Name) -> Path:
    """The log of a server."""
    return root / "logs" / f"{name}.log"


def logs_of(root: Path, names: Collection[str]) -> dict[str, Path]:
    """The logs of some servers, or of all where none is named.

    Raises ValueError for an unknown name, and where none of them has a log.
    """
    if unknown := [name for name in names if name not in NAMES]:
        raise ValueError(f"no server is called {unknown[0]!r}; they are {', '.join(NAMES)}"
                         f"{did_you_mean(unknown[0], NAMES)}")  # fmt: skip
    wanted: dict[str, Path] = {name: log_of(root, name) for name in NAMES if not names or name in names}
    logs = {name: log for name, log in wanted.items() if log.exists()}
    if not logs:
        raise ValueError(f"{root / 'logs'} has no log of {', '.join(wanted)}; `vila-ops up` starts the servers")
    return logs


def tail(root: Path, name: Name) -> str:
    """The last 30 lines of the log of a server that has ended, under a headline, without passwords in URLs."""
    path = log_of(root, name)
    lines = path.read_text(errors="replace").splitlines()[-30:]
    return shown("\n".join([f"the end of {path}:", *lines]))
