"""Processes of this machine: named by pid and start time, started in a session of their own, ended to the last one.

A pid alone names no process for good: the kernel gives it to another one later. Pid and start time do.
"""

import os
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

CLOCK_SLACK_SECONDS = 2.0
"""Start times that the kernel reports shift when the clock is set."""
POLL_SECONDS = 0.02


class ProcessId(NamedTuple):
    """One process of this machine, for good."""

    pid: int
    started: float
    """Seconds since the epoch, as the kernel reports it."""

    def alive(self) -> bool:
        """Whether this very process runs; a zombie has ended."""
        return find(self) is not None


def this_process() -> ProcessId:
    """The calling process."""
    return _id_of(psutil.Process())


def spawn(
    command: list[str] | tuple[str, ...], *, env: Mapping[str, str], log: Path | int, stdin: int | None = None
) -> ProcessId:
    """Start a command in a session of its own, with exactly this environment.

    Its output goes into a new file `log`, or to a descriptor of the caller's; its input is empty, or of `stdin`. It
    outlives the caller. posix_spawn, since a fork of a process with threads may hang.
    """
    empty = (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)
    new = (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    pid = os.posix_spawn(
        command[0],
        command,
        env,
        file_actions=[
            empty if stdin is None else (os.POSIX_SPAWN_DUP2, stdin, 0),
            (os.POSIX_SPAWN_DUP2, log, 1) if isinstance(log, int) else new,
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )
    return _id_of(psutil.Process(pid))


def find(process: ProcessId) -> psutil.Process | None:
    """The process if it runs; None for a zombie, and for a later process with the same pid."""
    try:
        there = psutil.Process(process.pid)
        same = abs(there.create_time() - process.started) < CLOCK_SLACK_SECONDS
        return there if same and there.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def session_of(leader: ProcessId) -> list[psutil.Process]:
    """The leader, the rest of its session, and their descendants in sessions of their own; no zombies.

    A session outlives its leader (Ray's agents do when their head is killed), and as long as it does the kernel gives
    the leader's pid to no other process. So another process under that pid means that the session has ended.
    """
    if psutil.pid_exists(leader.pid) and not leader.alive() and not _is_zombie(leader.pid):
        return []
    children: dict[int, list[psutil.Process]] = {}
    members: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            children.setdefault(process.ppid(), []).append(process)
            recent = process.create_time() >= leader.started - CLOCK_SLACK_SECONDS
            if recent and os.getsid(process.pid) == leader.pid:
                members[process.pid] = process
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    pending = list(members)
    while pending:
        new = [child for child in children.get(pending.pop(), []) if child.pid not in members]
        members.update({child.pid: child for child in new})
        pending += [child.pid for child in new]
    return list(members.values())


def stop(leader: ProcessId, *, grace_seconds: float) -> None:
    """End a process and everything that it started: SIGTERM, and SIGKILL after the grace.

    Raises TimeoutError where a process lives on. The leader is asked first and alone: Ray's head ends its parts in
    order (5 s), some of which ignore SIGTERM.
    """
    members = set(session_of(leader))  # those in sessions of their own are found only while their parent lives
    alone = find(leader)
    _end([alone] if alone else [], psutil.Process.terminate, grace_seconds)
    for send in (psutil.Process.terminate, psutil.Process.kill, psutil.Process.kill):  # twice: one may start another
        members |= set(session_of(leader))
        _end([process for process in members if _runs(process)], send, grace_seconds)
    if left := sorted(process.pid for process in members if _runs(process)):
        raise TimeoutError(f"processes {left} survive SIGKILL")


def _end(processes: Collection[psutil.Process], send: Callable[[psutil.Process], None], seconds: float) -> None:
    """Send a signal to each process and wait until all have ended, so many seconds at most."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            send(process)
    deadline = time.monotonic() + seconds
    while any(_runs(process) for process in processes) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    for process in processes:
        with suppress(ChildProcessError):  # a child of another process, which reaps it
            os.waitpid(process.pid, os.WNOHANG)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _id_of(process: psutil.Process) -> ProcessId:
    return ProcessId(process.pid, process.create_time())
