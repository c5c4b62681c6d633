"""Leases on addresses, so that two processes do not do the same work. The create-only seal keeps publishing safe.

A lease is one small register in the store, STORE/leases/<kind>/<key>, that is changed only by compare-and-swap: link(2)
on disk, If-Match on S3. Its holder sends heartbeats. A holder is dead when its register did not change for
`expiry_seconds` by the clock of the process that waits, so that the clocks of two machines need not agree. The fencing
number of each holder is one higher than that of the holder before.

A heartbeat also says how far the holder is (`progress.py`), and the release how its work ended.
"""

import json
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pydantic import ValidationError

from vila_ops.artifacts.backend import AT_ONCE, Backend
from vila_ops.artifacts.progress import ProgressRecord
from vila_ops.artifacts.store import Address, backend, probe, root_of
from vila_ops.config import Config
from vila_ops.errors import CorruptArtifact, LeaseLost, Preempted, VilaError
from vila_ops.processes import ProcessId, this_process

HEARTBEATS_PER_EXPIRY = 4
SILENT_SECONDS = 3600.0
"""Age of the last heartbeat at which a process that does not wait for a lease takes its holder for dead."""
ALIVE = "alive"
"""Kind of the leases that only show that a process lives."""
LOST_SECONDS = 180.0
"""Age of the last heartbeat at which a task counts as lost, by the clocks of the store and of who looks."""
Outcome = Literal["done", "failed", "stopped"]
"""How the work of a holder ended: with a result, by an error, or because someone or something asked it to end."""
log = logging.getLogger(__name__)
_ended: set[str] = set()
"""Tokens of the leases of this process that the store may still call held, though what held them has ended."""


class Holder(Config):
    """The process that holds a lease."""

    host: str
    pid: int
    started: float
    """Start time of the process, see `ProcessId`."""
    token: str
    """Random, so that two leases of one process differ."""

    @classmethod
    def myself(cls) -> "Holder":
        """This process, for one lease."""
        process = this_process()
        return cls(host=socket.gethostname(), pid=process.pid, started=process.started, token=secrets.token_hex(8))

    def is_gone(self) -> bool:
        """Whether the process was of this host and has ended, or is this one, whose work under the lease has ended.

        False where that cannot be known.
        """
        if self.token in _ended:
            return True
        return self.host == socket.gethostname() and not ProcessId(self.pid, self.started).alive()


class LeaseRecord(Config):
    """The content of an address's register."""

    holder: Holder
    fencing: int
    heartbeats: int
    """How many the holder has sent."""
    released: bool = False
    outcome: Outcome = "done"
    """Of a released lease."""
    progress: ProgressRecord | None = None
    """How far the holder was at its last heartbeat; None where it does not say."""


class LeasedTask(NamedTuple):
    """A lease whose holder says how far it is, or was."""

    at: str
    """KIND/KEY."""
    record: LeaseRecord
    progress: ProgressRecord
    lost: bool
    """Whether the holder's process ended without a word, or was not heard of for LOST_SECONDS."""


@dataclass(frozen=True)
class Pace:
    """Times of a lease, and the clock that measures them."""

    expiry_seconds: float = 60.0
    """A holder without a heartbeat for this long is dead."""
    poll_seconds: float = 1.0
    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


class Lease:
    """A held lease. A holder whose lease was taken over works on until it publishes, see `renew`."""

    def __init__(
        self, register: str, record: LeaseRecord, tag: str, pace: Pace, *, former: ProgressRecord | None
    ) -> None:
        """`former`: what the holder before released when its work was done; a holder without a report keeps it."""
        self.fencing = record.fencing
        self._former = former
        self._register, self._record, self._tag, self._pace = register, record, tag, pace
        self._backend: Backend = backend(register)
        self._last_heartbeat = pace.now()
        self._taken_over = False
        self._turn = threading.Lock()
        self.report: Callable[[], ProgressRecord | None] = lambda: None
        """How far the holder is; each heartbeat asks it, in a thread of its own."""

    @property
    def lost(self) -> bool:
        """Whether another process took the lease over, or may have: no heartbeat was stored for `expiry_seconds`."""
        return self._taken_over or self._pace.now() - self._last_heartbeat > self._pace.expiry_seconds

    def heartbeat(self, *, released: bool = False, outcome: Outcome = "done") -> None:
        """Store a heartbeat, or release the lease; notices whether another process took it over."""
        with self._turn:
            self._heartbeat(released=released, outcome=outcome)

    def renew(self) -> None:
        """Store a heartbeat before a result is published. Raises LeaseLost where another process took the lease over.

        A holder that was stopped for longer than a lease lives learns of it here.
        """
        self.heartbeat()
        if self._taken_over:
            raise LeaseLost(
                f"lease {self._register} was taken over, as this process gave no sign of life for "
                f"{self._pace.expiry_seconds:.0f} s; what it made is dropped, and the next try takes the other's result"
            )

    def _heartbeat(self, *, released: bool, outcome: Outcome) -> None:
        if self._taken_over:
            return
        now, progress = self._pace.now(), self.report()
        if released:  # the end of the work is its last progress
            progress = progress.with_changes({"advanced": time.time()}) if progress else self._former
        record = LeaseRecord(
            holder=self._record.holder, fencing=self.fencing, heartbeats=self._record.heartbeats + 1, released=released,
            outcome=outcome, progress=progress,
        )  # fmt: skip
        tag = self._backend.swap(self._register, _bytes(record), self._tag)
        if tag is None:
            self._taken_over = True
            log.warning("lease %s was taken over; what this process makes is dropped", self._register)
        else:
            self._record, self._tag, self._last_heartbeat = record, tag, now


@contextmanager
def hold(at: Address, *, store: str, pace: Pace = Pace()) -> Iterator[Lease]:
    """Hold the lease of an address while the body runs; waits while another process holds it.

    That process has probably sealed the address by then, so call `find` in the body before any work. Raises what
    `probe` raises.
    """
    probe(store)
    own = Holder.myself()
    try:
        lease = _acquire(f"{root_of(store)}/leases/{at.kind}/{at.key}", own, pace)
    except (OSError, VilaError):
        _ended.add(own.token)  # the store may have taken it, and its answer was lost
        raise
    done = threading.Event()
    heartbeats = threading.Thread(target=_send_heartbeats, args=(done, lease, pace), daemon=True)
    heartbeats.start()
    outcome: Outcome = "stopped"
    try:
        yield lease
        outcome = "done"
    except Exception as error:
        outcome = "stopped" if isinstance(error, Preempted) else "failed"
        raise
    finally:
        done.set()
        heartbeats.join()
        try:
            lease.heartbeat(released=True, outcome=outcome)
        except (OSError, VilaError) as error:
            _ended.add(own.token)
            log.warning("lease %s/%s was not released (%s); it will expire", at.kind, at.key, error)


@contextmanager
def alive(store: str) -> Iterator[str]:
    """Hold a lease of this process alone while the body runs, so that others see when it is killed; yields its name.

    It is removed where the body ends well. What is left of others is among `ended`. Raises what `probe` raises.
    """
    at = Address(kind=ALIVE, key=secrets.token_hex(16), recipe=None, parents=())
    with hold(at, store=store):
        yield at.key
    forget(at.key, store=store)


def ended(store: str) -> list[str]:
    """Names of the leases by `alive` whose bodies ended by an error or with their processes, see `registers`."""
    return [at.partition("/")[2] for at, is_held in registers(store, kind=ALIVE).items() if not is_held]


def forget(name: str, *, store: str) -> None:
    """Remove a lease by `alive`."""
    register = f"{root_of(store)}/leases/{ALIVE}/{name}"
    try:
        backend(register).remove(register)
    except (OSError, VilaError) as error:
        log.warning("lease %s was not removed: %s", register, error)


def sign_of_life(at: Address, *, store: str) -> str | None:
    """A text that changes while a process holds the lease of an address, and stays the same when it has died.

    None where the holder is known to be gone. Raises CorruptArtifact, and what the store raises.
    """
    record, tag = _load(f"{root_of(store)}/leases/{at.kind}/{at.key}")
    if record is not None and not record.released and record.holder.is_gone():
        return None
    return tag or "no process has held it"


def registers(store: str, *, kind: str = "") -> dict[str, bool]:
    """Every address of a store, as KIND/KEY, that has a lease, and whether a process holds it.

    A holder that was not heard of for SILENT_SECONDS is dead; so clocks of machines may differ by less than that. A
    damaged lease counts as held until then. With `kind` only the addresses of this kind.
    """
    root, changed = f"{root_of(store)}/leases", _changed(store, kind)
    return {at: time.time() - last < SILENT_SECONDS and _is_held(f"{root}/{at}") for at, last in changed.items()}


def tasks(store: str, *, since: float) -> list[LeasedTask]:
    """The leases that changed since a time, in seconds since 1970, of holders that say how far they are.

    Damaged leases are left out. Raises what the store raises.
    """
    recent = {at: last for at, last in _changed(store).items() if last >= since}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        records = list(pool.map(lambda at: _readable(f"{root_of(store)}/leases/{at}"), recent))
    return [
        LeasedTask(at, record, record.progress, _is_lost(record, last))
        for (at, last), record in zip(recent.items(), records, strict=True)
        if record is not None and record.progress is not None
    ]


def _is_lost(record: LeaseRecord, last: float) -> bool:
    return not record.released and (record.holder.is_gone() or time.time() - last > LOST_SECONDS)


def _changed(store: str, kind: str = "") -> dict[str, float]:
    """Time of the last change of every lease of a store, by KIND/KEY."""
    root = f"{root_of(store)}/leases"
    folder = f"{kind}/" if kind else ""
    changed: dict[str, float] = {}
    for entry in backend(root).entries(f"{root}/{kind}".rstrip("/")):
        address = "/".join(f"{folder}{entry.name}".split("/")[:2])
        if "/" in address:
            changed[address] = max(changed.get(address, 0.0), entry.changed)
    return changed


def _readable(register: str) -> LeaseRecord | None:
    try:
        return _load(register)[0]
    except CorruptArtifact:
        return None


def _is_held(register: str) -> bool:
    try:
        record, _ = _load(register)
    except CorruptArtifact:
        return True
    return record is not None and not record.released and not record.holder.is_gone()


def _acquire(register: str, own: Holder, pace: Pace) -> Lease:
    watched: str | None = None
    since, waits_for = pace.now(), 0
    while True:
        record, tag = _load(register)
        if tag != watched:
            watched, since = tag, pace.now()
        if record is None or record.released or record.holder.is_gone() or pace.now() - since > pace.expiry_seconds:
            mine = LeaseRecord(holder=own, fencing=1 if record is None else record.fencing + 1, heartbeats=0)
            swapped = backend(register).swap(register, _bytes(mine), tag)
            if swapped is not None:
                is_done = record is not None and record.released and record.outcome == "done"
                return Lease(register, mine, swapped, pace, former=record.progress if record and is_done else None)
            continue  # another process took it first
        if waits_for != record.fencing:
            log.info("%s: locked by PID %d on %s; waiting", register, record.holder.pid, record.holder.host)
            waits_for = record.fencing
        pace.sleep(pace.poll_seconds)


def _load(register: str) -> tuple[LeaseRecord | None, str | None]:
    version = backend(register).load(register)
    if version is None:
        return None, None
    try:
        return LeaseRecord.model_validate_json(version.data), version.tag
    except ValidationError as error:
        raise CorruptArtifact(f"{register} is not a lease; remove it when no process uses it: {error}") from error


def _send_heartbeats(done: threading.Event, lease: Lease, pace: Pace) -> None:
    while not done.wait(pace.expiry_seconds / HEARTBEATS_PER_EXPIRY):
        try:
            lease.heartbeat()
        except (OSError, VilaError) as error:  # the store may be back before the lease expires
            log.warning("a heartbeat was not stored: %s", error)


def _bytes(record: LeaseRecord) -> bytes:
    return json.dumps(record.model_dump(mode="json"), sort_keys=True).encode()
