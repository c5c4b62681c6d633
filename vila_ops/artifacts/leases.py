"""Leases on addresses, so that two processes do not make the same thing twice. They only save work.

What keeps publishing safe is the create-only seal. A lease is one small register in the store,
STORE/leases/<kind>/<key>, that is changed only by compare-and-swap: link(2) on disk, If-Match on S3. Its holder beats;
one whose register did not change for `expiry_seconds` of the waiter's own clock is dead, so that the clocks of two
machines need not agree. Each new holder's fencing number is one higher than the last one's.
"""

import json
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pydantic import ValidationError

from vila_ops.artifacts.backend import Backend
from vila_ops.artifacts.store import Address, backend, probe, root_of
from vila_ops.config import Config
from vila_ops.errors import CorruptArtifact
from vila_ops.processes import ProcessId, this_process

BEATS_PER_EXPIRY = 4
log = logging.getLogger(__name__)


class Holder(Config):
    """Who holds a lease."""

    host: str
    pid: int
    started: float
    """Start time of the process, see `ProcessId`."""
    token: str
    """Random: two leases of one process differ."""

    @classmethod
    def myself(cls) -> "Holder":
        """This process, for one lease."""
        process = this_process()
        return cls(host=socket.gethostname(), pid=process.pid, started=process.started, token=secrets.token_hex(8))

    def is_gone(self) -> bool:
        """Whether the process was of this host and has ended; False where that cannot be known."""
        return self.host == socket.gethostname() and not ProcessId(self.pid, self.started).alive()


class LeaseRecord(Config):
    """What the register of an address holds."""

    holder: Holder
    fencing: int
    beat: int
    """Counts the holder's signs of life."""
    released: bool = False


@dataclass(frozen=True)
class Pace:
    """How patient leases are, and by which clock."""

    expiry_seconds: float = 60.0
    """Without a sign of life for so long, a holder is dead."""
    poll_seconds: float = 1.0
    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


class Lease:
    """A held lease. `lost` tells whether it is still held; nothing else stops a holder that was taken over."""

    def __init__(self, register: str, record: LeaseRecord, tag: str, pace: Pace) -> None:
        self.fencing = record.fencing
        self._register, self._record, self._tag, self._pace = register, record, tag, pace
        self._backend: Backend = backend(register)
        self._beaten = pace.now()
        self._taken = False

    @property
    def lost(self) -> bool:
        """Whether another process took over, or may have: no beat came through for as long as a lease lives."""
        return self._taken or self._pace.now() - self._beaten > self._pace.expiry_seconds

    def beat(self, *, released: bool = False) -> None:
        """Give a sign of life, or the last one; finds out whether another process took over."""
        if self._taken:
            return
        now = self._pace.now()
        record = LeaseRecord(
            holder=self._record.holder, fencing=self.fencing, beat=self._record.beat + 1, released=released
        )
        tag = self._backend.swap(self._register, _bytes(record), self._tag)
        if tag is None:
            self._taken = True
            log.warning("lease %s was taken over; this process goes on, and its seal comes second", self._register)
        else:
            self._record, self._tag, self._beaten = record, tag, now


@contextmanager
def hold(at: Address, *, store: str, pace: Pace = Pace()) -> Iterator[Lease]:
    """Hold the lease of an address while the body runs; waits while another process holds it.

    After a wait that process has probably sealed: ask `find` inside, before any work. Raises what `probe` does.
    """
    probe(store)
    lease = _acquire(f"{root_of(store)}/leases/{at.kind}/{at.key}", pace)
    done = threading.Event()
    beating = threading.Thread(target=_beat_until, args=(done, lease, pace), daemon=True)
    beating.start()
    try:
        yield lease
    finally:
        done.set()
        beating.join()
        try:
            lease.beat(released=True)
        except OSError as error:
            log.warning("lease %s/%s was not released (%s); it expires", at.kind, at.key, error)


def _acquire(register: str, pace: Pace) -> Lease:
    own = Holder.myself()
    watched: str | None = None
    since, waits_for = pace.now(), 0
    while True:
        record, tag = _load(register)
        if tag != watched:
            watched, since = tag, pace.now()
        if record is None or record.released or record.holder.is_gone() or pace.now() - since > pace.expiry_seconds:
            mine = LeaseRecord(holder=own, fencing=1 if record is None else record.fencing + 1, beat=0)
            swapped = backend(register).swap(register, _bytes(mine), tag)
            if swapped is not None:
                return Lease(register, mine, swapped, pace)
            continue  # another process was quicker
        if waits_for != record.fencing:
            log.info("%s: process %d of %s is at it; waiting", register, record.holder.pid, record.holder.host)
            waits_for = record.fencing
        pace.sleep(pace.poll_seconds)


def _load(register: str) -> tuple[LeaseRecord | None, str | None]:
    found = backend(register).load(register)
    if found is None:
        return None, None
    try:
        return LeaseRecord.model_validate_json(found.data), found.tag
    except ValidationError as error:
        raise CorruptArtifact(f"{register} is not a lease; remove it, while nothing works on it: {error}") from error


def _beat_until(done: threading.Event, lease: Lease, pace: Pace) -> None:
    while not done.wait(pace.expiry_seconds / BEATS_PER_EXPIRY):
        try:
            lease.beat()
        except OSError as error:  # the store may be back before the lease expires
            log.warning("a beat did not come through: %s", error)


def _bytes(record: LeaseRecord) -> bytes:
    return json.dumps(record.model_dump(mode="json"), sort_keys=True).encode()
