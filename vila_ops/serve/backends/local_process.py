"""A server process that outlives the one that started it, recorded by pid and start time in the scratch folder."""

import fcntl
import json
import os
import re
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

import vila_ops
from vila_ops.config import Config
from vila_ops.serve.spec import Spec

STOP_SECONDS = 10.0
"""Between asking a process to end and killing it."""
TAIL_BYTES = 4000


class ServiceRecord(Config):
    """What runs for a service."""

    pid: int
    started: float
    """When the process started (seconds since the epoch): a later process may have the same pid."""
    host: str
    port: int
    identity: str

    def url(self) -> str:
        """Where it listens."""
        return f"http://{self.host}:{self.port}"

    def alive(self) -> bool:
        """Whether that very process still runs."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < 2  # the clock may have been set since
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


class ProcessManager:
    """The record, the log and the lock of one inline service."""

    def __init__(self, root: Path, name: str) -> None:
        if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
            raise ValueError(f"service name {name!r} must be letters, digits, '.', '_' and '-': it names files")
        self.folder = root / "serve"
        self.record_path, self.log_path = self.folder / f"{name}.json", self.folder / f"{name}.log"
        self.lock_path = self.folder / f"{name}.lock"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One deploy or undeploy of the service at a time on this machine."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.lock_path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def read(self) -> ServiceRecord | None:
        """The record of a process that still runs."""
        try:
            record = ServiceRecord.model_validate_json(self.record_path.read_text())
        except FileNotFoundError:
            return None
        return record if record.alive() else None

    def write(self, record: ServiceRecord) -> None:
        """Replace the record."""
        draft = self.record_path.with_name(f".{self.record_path.name}-{secrets.token_hex(4)}")
        draft.write_text(json.dumps(record.model_dump(), indent=1))
        draft.replace(self.record_path)

    def start(self, spec: Spec, *, host: str, port: int) -> ServiceRecord:
        """A detached `python -m vila_ops.serve.inline`, recorded before it is ready."""
        package = str(Path(vila_ops.__file__).parents[1])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        log = (os.POSIX_SPAWN_OPEN, 1, str(self.log_path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-m", "vila_ops.serve.inline", spec.model_dump_json(), host, str(port)],
            {**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            file_actions=[(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0), log, (os.POSIX_SPAWN_DUP2, 1, 2)],
            setsid=True,
        )
        started = psutil.Process(pid).create_time()
        record = ServiceRecord(pid=pid, started=started, host=host, port=port, identity=spec.identity())
        self.write(record)
        return record

    def stop(self, record: ServiceRecord) -> None:
        """End the process, gracefully first, and forget it."""
        for ending in (psutil.Process.terminate, psutil.Process.kill):
            with suppress(psutil.NoSuchProcess):
                if record.alive():
                    ending(psutil.Process(record.pid))
            deadline = time.monotonic() + STOP_SECONDS
            while record.alive() and time.monotonic() < deadline:  # a zombie, which its parent has to reap, has ended
                time.sleep(0.02)
        if record.alive():
            raise RuntimeError(f"process {record.pid}, which serves {record.url()}, survives SIGKILL")
        self.record_path.unlink(missing_ok=True)

    def tail(self) -> str:
        """The end of the log."""
        with self.log_path.open("rb") as file:
            file.seek(max(0, self.log_path.stat().st_size - TAIL_BYTES))
            return file.read().decode(errors="replace")


def free_port(host: str, port: int) -> int:
    """The port itself if nobody holds it (0: any free one); raises ValueError that names the holder."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            text = f"port {port} of {host} cannot be used ({error.strerror}){_holder(port)}"
            raise ValueError(f"{text}; end what holds it, or choose another serve_port") from error
        return int(probe.getsockname()[1])


def _holder(port: int) -> str:
    for one in psutil.net_connections("tcp"):
        address: Any = one.laddr
        if one.status == psutil.CONN_LISTEN and address.port == port and one.pid is not None:
            return f": process {one.pid} listens there"
    return ""
