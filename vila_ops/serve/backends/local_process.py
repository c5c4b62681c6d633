"""Launch inline: a server process on this machine, recorded by pid and start time in the scratch folder."""

import fcntl
import json
import os
import re
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import psutil
from pydantic import ValidationError

import vila_ops
from vila_ops.config import Config, Resources
from vila_ops.errors import CorruptArtifact
from vila_ops.processes import ProcessId, spawn, stop
from vila_ops.serve.backends.backend import START_SECONDS
from vila_ops.serve.spec import Spec

STOP_SECONDS = 10.0
"""Between asking a process to end and killing it."""
TAIL_BYTES = 4000


class ServiceRecord(Config):
    """The server process of a service."""

    pid: int
    started: float
    """Start time of the process, see `ProcessId`."""
    host: str
    port: int
    identity: str

    def url(self) -> str:
        """Where it listens."""
        return f"http://{self.host}:{self.port}"

    def process(self) -> ProcessId:
        """The process that serves."""
        return ProcessId(self.pid, self.started)

    def alive(self) -> bool:
        """Whether this process still runs; another process with its pid does not count."""
        return self.process().alive()


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
        """Hold the lock of the service on this machine: one deploy or undeploy at a time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.lock_path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def read(self) -> ServiceRecord | None:
        """The record of the process that was started last, which may have ended. Raises CorruptArtifact."""
        try:
            return ServiceRecord.model_validate_json(self.record_path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise CorruptArtifact(
                f"{self.record_path} is not the record of a service; end the process that serves, if it runs, remove "
                f"this file and run again"
            ) from error

    def write(self, record: ServiceRecord) -> None:
        """Replace the record."""
        draft = self.record_path.with_name(f".{self.record_path.name}-{secrets.token_hex(4)}")
        draft.write_text(json.dumps(record.model_dump(), indent=1))
        draft.replace(self.record_path)

    def start(self, spec: Spec, *, host: str, port: int) -> ServiceRecord:
        """Start a detached server process and record it before it is ready."""
        package = str(Path(vila_ops.__file__).parents[1])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        process = spawn(
            [sys.executable, "-m", "vila_ops.serve.backends.local_server", spec.model_dump_json(), host, str(port)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            log=self.log_path,
        )
        record = ServiceRecord(pid=process.pid, started=process.started, host=host, port=port, identity=spec.identity())
        self.write(record)
        return record

    def stop(self, record: ServiceRecord) -> None:
        """End the process and what it started, and remove its record. Raises TimeoutError."""
        stop(record.process(), grace_seconds=STOP_SECONDS)
        self.record_path.unlink(missing_ok=True)

    def tail(self) -> str:
        """The end of the log."""
        with self.log_path.open("rb") as file:
            file.seek(max(0, self.log_path.stat().st_size - TAIL_BYTES))
            return file.read().decode(errors="replace")


class LocalProcess:
    """Implements `ServiceBackend` by one process on this machine."""

    def __init__(self, name: str, resources: Resources) -> None:
        self.manager, self.resources = ProcessManager(resources.storage.scratch(), name), resources.serve

    def locked(self) -> AbstractContextManager[None]:
        """As in `ServiceBackend`; other processes wait."""
        return self.manager.locked()

    def url(self) -> str | None:
        """As in `ServiceBackend`."""
        record = self._alive()
        return None if record is None else record.url()

    def apply(self, spec: Spec) -> str:
        """As in `ServiceBackend`. A process of another spec ends first; so does one that never became ready."""
        if record := self._alive():
            may_load = time.time() - record.started < START_SECONDS
            if record.identity == spec.identity() and may_load:
                return record.url()
            self.manager.stop(record)
        port = free_port(self.resources.host, self.resources.port)
        return self.manager.start(spec, host=self.resources.host, port=port).url()

    def running(self) -> bool:
        """As in `ServiceBackend`: a process that listens has loaded its weights."""
        return True

    def failure(self) -> str | None:
        """As in `ServiceBackend`."""
        record = self.manager.read()
        if record is None:
            return "no process was started"
        return None if record.alive() else f"process {record.pid} ended"

    def state(self) -> str:
        """The end of the log."""
        return self.manager.tail()

    def remove(self) -> None:
        """As in `ServiceBackend`."""
        if record := self._alive():
            self.manager.stop(record)

    def _alive(self) -> ServiceRecord | None:
        record = self.manager.read()
        return record if record is not None and record.alive() else None


def free_port(host: str, port: int) -> int:
    """The port itself if no process holds it (0: any free one). Raises ValueError that names the holder."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            text = f"port {port} of {host} cannot be used ({error.strerror}){_holder(port)}"
            raise ValueError(f"{text}; end what holds it, or choose another serve.port") from error
        return int(probe.getsockname()[1])


def _holder(port: int) -> str:
    for one in psutil.net_connections("tcp"):
        address: Any = one.laddr
        if one.status == psutil.CONN_LISTEN and address.port == port and one.pid is not None:
            return f": process {one.pid} listens there"
    return ""
