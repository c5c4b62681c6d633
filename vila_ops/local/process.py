"""A server as processes: started and recorded, found again, and ended to the last one."""

import fcntl
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import psutil

from vila_ops.config.base import Config
from vila_ops.config.local import LocalServers

log = logging.getLogger(__name__)


Name = Literal["mlflow", "prefect", "ray", "worker"]


NAMES: tuple[Name, ...] = ("mlflow", "prefect", "ray", "worker")


START_TIME_SLACK_SECONDS = 1.0
"""The kernel's start times shift a little when the clock is set."""


class ProcessRecord(Config):
    """A server that `up` started, as kept in root/pids/NAME.json."""

    name: Name
    pid: int
    started: float
    """The leader's start time by the kernel; with the pid it names one process for good."""
    command: tuple[str, ...]
    env: dict[str, str]
    directory: str
    """Working directory: two checkouts may not share one root."""


def spawn(root: Path, name: Name, command: tuple[str, ...], env: dict[str, str]) -> ProcessRecord:
    """Start it in a session of its own and record it; the log of its last life is kept beside the new one."""
    logs = root / "logs"
    logs.mkdir(exist_ok=True)
    if (last := logs / f"{name}.log").exists():
        last.replace(logs / f"{name}.last.log")
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    output = os.open(logs / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        pid = os.posix_spawn(
            command[0],
            command,
            {**os.environ, "PATH": path, **env},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, output, 1),
                (os.POSIX_SPAWN_DUP2, output, 2),
            ],
            setsid=True,
        )
    finally:
        os.close(output)
    record = ProcessRecord(
        name=name,
        pid=pid,
        started=psutil.Process(pid).create_time(),
        command=command,
        env=env,
        directory=str(Path.cwd()),
    )
    write_private(record_path(root, name), record.model_dump_json(indent=2))
    return record


def end(settings: LocalServers, record: ProcessRecord) -> None:
    """End the recorded server and everything that it started; forget it."""
    began = time.monotonic()
    leader = leader_of(record)
    # The leader first: Ray's head takes its parts down in order (5 s), while some of them ignore SIGTERM.
    for ending, processes in (
        (psutil.Process.terminate, [leader] if leader else []),
        (psutil.Process.terminate, None),
        (psutil.Process.kill, None),
        (psutil.Process.kill, None),
    ):
        targets = processes_of(record) if processes is None else processes
        for process in targets:
            with suppress(psutil.NoSuchProcess):
                ending(process)
        psutil.wait_procs(targets, timeout=settings.stop_grace_seconds)
    if left := processes_of(record):
        raise RuntimeError(f"{record.name}: processes {[process.pid for process in left]} survive SIGKILL")
    record_path(root_of(settings), record.name).unlink(missing_ok=True)
    log.info("%s: ended after %.1f s", record.name, time.monotonic() - began)


def leader_of(record: ProcessRecord) -> psutil.Process | None:
    """The recorded process, if it still lives; a later owner of its pid is not it."""
    try:
        process = psutil.Process(record.pid)
        same = abs(process.create_time() - record.started) < START_TIME_SLACK_SECONDS
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def processes_of(record: ProcessRecord) -> list[psutil.Process]:
    """The recorded process, the rest of its session, and their descendants in sessions of their own.

    A session outlives its leader (Ray's agents do when their head is killed), and as long as it does the kernel gives
    the leader's pid to nobody else: a stranger under that pid means that the session is gone.
    """
    if psutil.pid_exists(record.pid) and not leader_of(record) and not _is_zombie(record.pid):
        return []
    children: dict[int, list[psutil.Process]] = {}
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            children.setdefault(process.ppid(), []).append(process)
            recent = process.create_time() >= record.started - START_TIME_SLACK_SECONDS
            if recent and os.getsid(process.pid) == record.pid:
                found[process.pid] = process
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    pending = list(found)
    while pending:
        new = [child for child in children.get(pending.pop(), []) if child.pid not in found]
        found.update({child.pid: child for child in new})
        pending += [child.pid for child in new]
    return list(found.values())


def _is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def root_of(settings: LocalServers) -> Path:
    return Path(settings.root).expanduser().absolute()


@contextmanager
def lock(root: Path) -> Iterator[None]:
    """One `up` or `down` of a root at a time; the kernel frees it when the holder ends."""
    (root / "pids").mkdir(parents=True, exist_ok=True)
    with (root / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def record_path(root: Path, name: Name) -> Path:
    return root / "pids" / f"{name}.json"


def read_record(root: Path, name: Name) -> ProcessRecord | None:
    path = record_path(root, name)
    try:
        return ProcessRecord.model_validate_json(path.read_text())
    except FileNotFoundError:
        return None


def write_private(path: Path, text: str) -> None:
    """All or nothing, and readable by us alone."""
    draft = path.with_suffix(".draft")
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    draft.replace(path)


def tail(root: Path, name: Name) -> str:
    path = root / "logs" / f"{name}.log"
    lines = path.read_text(errors="replace").splitlines()[-30:]
    return "\n".join([f"the end of {path}:", *lines])
