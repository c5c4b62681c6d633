"""Up, down and status of the servers of one machine, by the records of their processes."""

import logging
import os
import shutil
import time
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Literal

import psutil

from vila_ops.config.base import Config
from vila_ops.config.local import LocalServers
from vila_ops.errors import ServerFailed
from vila_ops.local.deployments import deploy_flows, make_work_pool
from vila_ops.local.process import (
    NAMES,
    RESTORING,
    Name,
    ProcessRecord,
    end,
    lock,
    read_record,
    recorded,
    root_of,
    start,
    tail,
)
from vila_ops.local.servers import QUICK_SECONDS, Endpoints, Server, endpoints, prepare, ray_folder, servers_of
from vila_ops.processes import session_of

SHOWN = 100
"""Characters of another process's command that an error shows."""

ADOPT_SECONDS = 30.0
"""How long a server may take to answer before `up` replaces it: a busy machine must not cost a server that works."""

AFTER_PREFECT: tuple[Name, ...] = ("worker", "sweeper")
"""Servers that need Prefect's to answer."""
ENDPOINT = "vila_ops.serve.backends.local_router"
"""Module of the process that listens for a service of launch inline. It outlives the process that deployed it."""

log = logging.getLogger(__name__)


class ServerStatus(Config):
    """The state of one server."""

    name: Name
    state: Literal["healthy", "unhealthy", "stopped"]
    url: str
    pid: int | None
    """None if it does not run."""
    memory_bytes: int
    """Memory of its process tree; shared pages are counted once."""


def up(settings: LocalServers, *, only: Collection[Name] = NAMES) -> Endpoints:
    """Start every server that does not run, does not answer or is configured otherwise.

    A server that became healthy stays up when another fails, so that the next call continues from there. Raises
    ServerFailed, and ValueError for a port that another process holds and after half a restore.
    """
    root = root_of(settings)
    servers = {name: server for name, server in servers_of(settings).items() if name in only}
    with lock(root), ThreadPoolExecutor() as pool:
        if (root / RESTORING).exists():
            raise ValueError(
                f"a restore did not end, as {root / RESTORING} says; run `vila-ops restore` again, or move away what "
                f"it has written and this file"
            )
        _check_ports(settings, servers.values())
        # All servers are ended before any is started, because a port may pass from one to another.
        first = [name for name in servers if name not in AFTER_PREFECT]
        up_already = dict(zip(first, pool.map(lambda name: _adopt(settings, servers[name]), first), strict=True))
        for name in servers.keys() - up_already.keys():  # Prefect cannot be asked about them while it is away itself
            up_already[name] = _adopt(settings, servers[name], ask=up_already.get("prefect", False))
        missing = {name: server for name, server in servers.items() if not up_already[name]}
        starts = {n: pool.submit(_start, settings, server) for n, server in missing.items() if n not in AFTER_PREFECT}
        pending = list(starts.values())
        if "prefect" in servers and ("prefect" not in starts or starts["prefect"].exception() is None):
            make_work_pool(settings)
            pending.append(pool.submit(deploy_flows, settings))
            pending += [pool.submit(_start, settings, missing[name]) for name in AFTER_PREFECT if name in missing]
        errors = [error for future in pending if (error := future.exception())]
    if errors:
        raise ServerFailed("\n\n".join(str(error) for error in errors)) from errors[0]
    return endpoints(settings)


def down(settings: LocalServers) -> None:
    """End every process that `up` started. Files below `root` are kept, those outside are removed."""
    root = root_of(settings)
    with lock(root):
        records = [record for name in NAMES if (record := read_record(root, name))]
        with ThreadPoolExecutor() as pool:
            for future in [pool.submit(end, settings, record) for record in records]:
                future.result()
        shutil.rmtree(ray_folder(settings), ignore_errors=True)


def status(settings: LocalServers) -> list[ServerStatus]:
    """The state of every server."""
    root = root_of(settings)
    return [_status(server, read_record(root, name)) for name, server in servers_of(settings).items()]


def owns(settings: LocalServers, pid: int) -> bool:
    """Whether a process is a server that `up` started, or one that such a server started."""
    return pid in _processes(settings)


def runs(settings: LocalServers, name: Name) -> bool:
    """Whether the process of a server lives. Unlike `status` it sends no request."""
    record = read_record(root_of(settings), name)
    return record is not None and record.process().alive()


def _processes(settings: LocalServers) -> set[int]:
    records = [record for name in NAMES if (record := read_record(root_of(settings), name))]
    return {process.pid for record in records for process in session_of(record.process())}


def _adopt(settings: LocalServers, server: Server, *, ask: bool = True) -> bool:
    """Whether a server runs as configured and, if it is asked, answers. A server that does not is ended."""
    record = read_record(root_of(settings), server.name)
    if record is None:
        return False
    works = record.process().alive() and _as_configured(record, server)
    if works and (not ask or server.healthy(record, ADOPT_SECONDS)):
        log.info("%s: already up, pid %d, %s", server.name, record.pid, server.url)
        return True
    end(settings, record)
    return False


def _spawned(settings: LocalServers, server: Server) -> ProcessRecord:
    fresh = prepare(settings, server.name)
    return start(settings, server.name, server.command, server.env, fresh)


def _start(settings: LocalServers, server: Server) -> None:
    """Start a server and wait until it answers. Raises ServerFailed with the end of its log."""
    root = root_of(settings)
    began = time.monotonic()
    record = _spawned(settings, server)
    while not server.healthy(record, settings.start_timeout_seconds):
        alive, seconds = record.process().alive(), time.monotonic() - began
        if not alive or seconds > settings.start_timeout_seconds:
            end(settings, record)
            logged = tail(root, server.name)
            if seconds > settings.start_timeout_seconds or not server.gives_up or server.gives_up not in logged:
                reason = "did not answer in time" if alive else "ended"
                raise ServerFailed(f"{server.name} {reason} after {seconds:.0f} s; {logged}")
            log.info("%s: gave up after %.0f s on a busy machine; starting it again", server.name, seconds)
            record = _spawned(settings, server)
        time.sleep(0.1)
    log.info("%s: up after %.1f s, pid %d, %s", server.name, time.monotonic() - began, record.pid, server.url)


def _as_configured(record: ProcessRecord, server: Server) -> bool:
    return (record.command, record.env, record.directory) == (server.command, recorded(server.env), str(Path.cwd()))


def _check_ports(settings: LocalServers, servers: Iterable[Server]) -> None:
    """Raise ValueError where a process that `up` did not start holds a port that we need."""
    wanted = {key: port for server in servers for key, port in server.ports.items()}
    wanted["serve_port"] = settings.serve_port
    ours = _processes(settings)
    held = _listeners(wanted.values())
    # A process that is ending (Ray's agents, after their head was killed) holds ports but is no longer visible.
    began = time.monotonic()
    while None in held.values() and time.monotonic() - began < settings.stop_grace_seconds:
        time.sleep(0.1)
        held = _listeners(wanted.values())
    faults = [
        f"port {port} is held by {_describe(held[port])}, which `vila-ops up` did not start; "
        f"end it, or set {key} in configs/local.yaml to a free port"
        for key, port in wanted.items()
        if port in held and held[port] not in ours and not (port == settings.serve_port and _is_endpoint(held[port]))
    ]
    if faults:
        raise ValueError("\n".join(faults))


def _listeners(ports: Collection[int]) -> dict[int, int | None]:
    """The listening process of each of these ports that is in use; None where it is not visible."""
    return {
        connection.laddr.port: connection.pid
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port in ports
    }


def _is_endpoint(pid: int | None) -> bool:
    """Whether a process is the endpoint of a service that this user deployed with launch inline."""
    with suppress(psutil.Error):
        process = psutil.Process(pid) if pid is not None else None
        return process is not None and process.uids().real == os.getuid() and ENDPOINT in process.cmdline()
    return False


def _describe(pid: int | None) -> str:
    if pid is None:
        return "a process of another user"
    try:
        command = " ".join(" ".join(psutil.Process(pid).cmdline()).split())
        return f"process {pid} ({command if len(command) <= SHOWN else command[: SHOWN - 3] + '...'})"
    except psutil.Error:
        return f"process {pid}"


def _status(server: Server, record: ProcessRecord | None) -> ServerStatus:
    if record is None or not record.process().alive():
        return ServerStatus(name=server.name, state="stopped", url=server.url, pid=None, memory_bytes=0)
    return ServerStatus(
        name=server.name,
        state="healthy" if server.healthy(record, QUICK_SECONDS) else "unhealthy",
        url=server.url,
        pid=record.pid,
        memory_bytes=sum(_memory_bytes(process) for process in session_of(record.process())),
    )


def _memory_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0
