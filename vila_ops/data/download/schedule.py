"""The schedule of requests: URLs in order of appearance, within the limits of each host. No I/O."""

import asyncio
import heapq
import itertools
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(slots=True)
class FetchJob:
    """A URL to request."""

    url: str
    host: bytes
    attempts: int = 0


@dataclass(slots=True)
class _Host:
    waiting: deque[FetchJob] = field(default_factory=deque)
    in_flight: int = 0
    next_start: float = 0.0
    """Earliest start of the next request, on the event loop's clock."""
    queued: bool = False


class HostSchedule:
    """Yields jobs within the limits of each host, so that a slow host delays only its own URLs."""

    def __init__(self, jobs: Iterable[FetchJob], *, per_host: int, per_second: float) -> None:
        self._per_host = per_host
        self._interval = 1 / per_second
        self._hosts: dict[bytes, _Host] = {}
        self._queue: list[tuple[float, int, _Host]] = []
        """A heap of hosts with jobs, by the time of their next request."""
        self._numbers = itertools.count()
        self._left = 0
        self._changed = asyncio.Event()
        for job in jobs:
            self._left += 1
            self._hosts.setdefault(job.host, _Host()).waiting.append(job)
        for host in self._hosts.values():
            self._enqueue(host)

    async def next(self) -> FetchJob | None:
        """The next job, as soon as its host permits; None when all are done. One caller at a time."""
        now = asyncio.get_running_loop().time
        while self._left:
            if self._queue and self._queue[0][0] <= now():
                host = heapq.heappop(self._queue)[2]
                host.queued = False
                if host.next_start <= now():  # else a pause was set after it was queued
                    host.next_start = now() + self._interval
                    host.in_flight += 1
                    job = host.waiting.popleft()
                    job.attempts += 1
                    self._enqueue(host)
                    return job
                self._enqueue(host)
            else:
                self._changed.clear()
                try:
                    async with asyncio.timeout_at(self._queue[0][0] if self._queue else None):
                        await self._changed.wait()
                except TimeoutError:
                    continue  # the first host may be requested now
        return None

    def done(self, job: FetchJob) -> None:
        """Mark a job as finished."""
        self._left -= 1
        self._release(job)
        self._changed.set()

    def again(self, job: FetchJob, *, seconds: float, pause_host: bool) -> None:
        """Schedule a job again after `seconds`; `pause_host` delays all jobs of its host as well."""
        loop = asyncio.get_running_loop()
        if pause_host:
            host = self._hosts[job.host]
            host.next_start = max(host.next_start, loop.time() + seconds)
        loop.call_later(seconds, self._rejoin, job)
        self._release(job)

    def _rejoin(self, job: FetchJob) -> None:
        host = self._hosts[job.host]
        host.waiting.append(job)
        self._enqueue(host)

    def _release(self, job: FetchJob) -> None:
        host = self._hosts[job.host]
        host.in_flight -= 1
        self._enqueue(host)

    def _enqueue(self, host: _Host) -> None:
        if host.waiting and not host.queued and host.in_flight < self._per_host:
            heapq.heappush(self._queue, (host.next_start, next(self._numbers), host))
            host.queued = True
            self._changed.set()
