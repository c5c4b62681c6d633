"""Launch inline: server processes on this machine, recorded by pid and start time in the scratch folder."""

import fcntl
import json
import os
import re
import secrets
import socket
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
from pydantic import ValidationError

import vila_ops
from vila_ops import __version__
from vila_ops.config import Config, Resources, fingerprint
from vila_ops.errors import CorruptArtifact
from vila_ops.generate.load import check_installed
from vila_ops.processes import ProcessId, spawn, stop
from vila_ops.serve.backends.backend import METRICS_SECONDS
from vila_ops.serve.router.scrape import Headers
from vila_ops.serve.router.state import SUFFIX, Register, Track
from vila_ops.serve.spec import Spec

STOP_SECONDS = 10.0
"""Between asking a process to end and killing it."""
TAIL_BYTES = 4000
LOOPBACK = "127.0.0.1"


class ServiceRecord(Config):
    """The router of a service."""

    pid: int
    started: float
    """Start time of the process, see `ProcessId`."""
    host: str
    port: int
    identity: str
    """What the router depends on."""

    def url(self) -> str:
        """Where it listens."""
        return f"http://{self.host}:{self.port}"

    def process(self) -> ProcessId:
        """The process that listens."""
        return ProcessId(self.pid, self.started)

    def alive(self) -> bool:
        """Whether this process still runs; another process with its pid does not count."""
        return self.process().alive()


class ProcessManager:
    """The record of the router, the logs and the lock of one inline service."""

    def __init__(self, root: Path, name: str) -> None:
        if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
            raise ValueError(f"service name {name!r} must be letters, digits, '.', '_' and '-': it names files")
        self.name, self.folder = name, root / "serve"
        self.record_path, self.log_path = self.folder / f"{name}.json", self.folder / f"{name}.log"
        self.lock_path = self.folder / f"{name}.lock"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the service on this machine: one command at a time."""
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

    def start(self, module: str, *arguments: str, log: Path) -> ProcessId:
        """Start a detached process of a module of this package."""
        package = str(Path(vila_ops.__file__).parents[1])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        command = [sys.executable, "-m", f"vila_ops.serve.backends.{module}", *arguments]
        return spawn(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, log=log)

    def stop(self, record: ServiceRecord) -> None:
        """End the process and what it started, and remove its record. Raises TimeoutError."""
        stop(record.process(), grace_seconds=STOP_SECONDS)
        self.record_path.unlink(missing_ok=True)

    def log_of(self, spec: Spec) -> Path:
        """The log of the replicas of a version."""
        return self.folder / f"{self.name}-version-{spec.version.version}.log"


class LocalProcess:
    """Implements `ServiceBackend` by processes on this machine: the router, and one for each track."""

    def __init__(self, name: str, resources: Resources) -> None:
        self.manager, self.resources = ProcessManager(resources.storage.scratch(), name), resources
        self.register = Register(str(self.manager.folder / f"{name}{SUFFIX}"))

    def locked(self) -> AbstractContextManager[None]:
        """As in `ServiceBackend`; other processes wait."""
        return self.manager.locked()

    def url(self) -> str | None:
        """As in `ServiceBackend`."""
        record = self._alive()
        return None if record is None else record.url()

    def open(self) -> str:
        """As in `ServiceBackend`. A router of another address or another release of this package ends first."""
        record = self._alive()
        if record is not None and record.identity == self._identity():
            return record.url()
        if record is not None:
            self.manager.stop(record)
        host, port = self._address()
        arguments = (self.manager.name, self.resources.model_dump_json(), host, str(port))
        process = self.manager.start("local_router", *arguments, log=self.manager.log_path)
        record = ServiceRecord(
            pid=process.pid, started=process.started, host=host, port=port, identity=self._identity()
        )
        self.manager.write(record)
        return record.url()

    def start(self, spec: Spec) -> Track:
        """As in `ServiceBackend`: a process on a port of its own, which only this machine reaches.

        Raises ValueError for an engine that is not installed here.
        """
        check_installed(spec.capacity.engine.kind)
        record = self._alive()
        if record is None or record.identity != self._identity():
            self._address()
        port = free_port(LOOPBACK, 0)
        process = self.manager.start(
            "local_server", spec.model_dump_json(), LOOPBACK, str(port), log=self.manager.log_of(spec)
        )
        return Track(spec=spec, url=f"http://{LOOPBACK}:{port}", process=process)

    def running(self, track: Track) -> bool:
        """As in `ServiceBackend`: a process that listens has loaded its weights."""
        return True

    def failure(self, track: Track) -> str | None:
        """As in `ServiceBackend`."""
        process = _process(track)
        return None if process.alive() else f"process {process.pid} ended"

    def state(self, track: Track) -> str:
        """The end of the log."""
        path = self.manager.log_of(track.spec)
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            return file.read().decode(errors="replace")

    def metrics(self, track: Track, headers: Headers) -> list[bytes]:
        """As in `ServiceBackend`: of the one replica, which checks the key of the request."""
        try:
            sent = httpx.get(f"{track.url}/metrics", headers=list(headers), timeout=METRICS_SECONDS, trust_env=False)
            return [sent.raise_for_status().content]
        except httpx.HTTPError as error:
            raise OSError(f"{error!r}") from error

    def stop(self, track: Track) -> None:
        """As in `ServiceBackend`. Raises TimeoutError."""
        stop(_process(track), grace_seconds=STOP_SECONDS)

    def close(self) -> None:
        """As in `ServiceBackend`."""
        if record := self._alive():
            self.manager.stop(record)

    def _identity(self) -> str:
        serve = self.resources.serve
        return fingerprint({"host": serve.host, "port": serve.port, "release": __version__})

    def _address(self) -> tuple[str, int]:
        """Where a new router will listen. Raises ValueError for a port that another process than our router holds."""
        host, port = self.resources.serve.host, self.resources.serve.port
        record = self._alive()
        if record is not None and (record.host, record.port) == (host, port):
            return host, port
        return host, free_port(host, port)

    def _alive(self) -> ServiceRecord | None:
        record = self.manager.read()
        return record if record is not None and record.alive() else None


def _process(track: Track) -> ProcessId:
    assert track.process is not None, "a track of launch inline"
    return track.process


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
