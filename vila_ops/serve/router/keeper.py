"""Which tracks get requests: the router's view of the register. It takes a bad canary back, and ends retired tracks."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial

from vila_ops.errors import VilaError
from vila_ops.serve.router.state import Canary, Register, Rollback, ServiceState, Track
from vila_ops.serve.router.upstream import Upstream
from vila_ops.serve.router.watch import CanaryWatch

POLL_SECONDS = 0.5
PROBE_SECONDS = 2.0
"""Between two questions for the state of a canary."""
ANSWER_SECONDS = 5.0
"""How long a canary may take to answer one."""
BROKEN_SECONDS = 10.0
"""How long a canary that was taken back may go on with what it answers."""
SPARE_SECONDS = 30.0
"""Beyond the time limit of an answer, before a retired track ends although it is not idle."""
log = logging.getLogger(__name__)


class Keeper:
    """The tracks of one service. For one event loop."""

    def __init__(self, register: Register, stop: Callable[[Track], None]) -> None:
        self._register, self._stop = register, stop
        self.watch: CanaryWatch | None = None
        self._under_way: Counter[str] = Counter()
        self._retired_at: dict[str, float] = {}
        self._adopt(register.load())

    @property
    def stable(self) -> Track | None:
        """The track that gets what the canary does not."""
        return self._state.stable

    @property
    def tracks(self) -> tuple[Track, ...]:
        """Every track that has requests or may get some."""
        return tuple(track for track in self._state.tracks() if track != self._state.starting)

    @property
    def canary(self) -> Canary | None:
        """The canary, unless it has to be taken back."""
        return self._state.canary if self.watch is not None and self.watch.verdict is None else None

    @contextmanager
    def using(self, track: Track) -> Iterator[None]:
        """Keep a track alive for a request."""
        self._under_way[track.url] += 1
        try:
            yield
        finally:
            self._under_way[track.url] -= 1

    async def refresh(self) -> None:
        """Read the register. Raises CorruptArtifact, and errors of the store."""
        self._adopt(await asyncio.to_thread(self._register.load))

    async def keep(self, upstream: Upstream) -> None:
        """Follow the register and the canary until this task is cancelled.

        Tracks end apart from that: a replica may take minutes to end, and a promotion does not wait for it.
        """
        await asyncio.gather(_repeat(self._follow), _repeat(self._end_retired), self._probe(upstream))

    async def _follow(self) -> None:
        await self.refresh()
        if self.watch is not None and self.watch.verdict is not None:
            await self._take_back(self.watch)

    async def _probe(self, upstream: Upstream) -> None:
        while True:
            if (canary := self.canary) is not None and (watch := self.watch) is not None:
                watch.probed(await upstream.ready(canary.track, seconds=ANSWER_SECONDS))
            await asyncio.sleep(PROBE_SECONDS)

    def _adopt(self, state: ServiceState) -> None:
        canary = state.canary
        if canary is None:
            self.watch = None
        elif self.watch is None or self.watch.canary != canary:
            self.watch = CanaryWatch(canary)
        self._state = state
        now = time.monotonic()
        self._retired_at = {one.url: self._retired_at.get(one.url, now) for one in state.retired}

    async def _take_back(self, watch: CanaryWatch) -> None:
        """Retire the canary of a watch in the register, with its verdict."""
        version = watch.canary.track.spec.version
        rollback = Rollback(
            version=version.version,
            digest=version.checkpoint.digest,
            reason=watch.verdict or "",
            at=datetime.now(UTC).isoformat(timespec="seconds"),
        )

        def without(state: ServiceState) -> ServiceState:
            if state.canary != watch.canary:
                return state
            retired = (*state.retired, watch.canary.track)
            return state.with_changes({"canary": None, "retired": retired, "rolled_back": rollback})

        log.warning("the canary, version %d, is rolled back: %s", version.version, watch.verdict)
        state = await asyncio.to_thread(self._register.change, without)
        spare = watch.canary.track.spec.service.request_timeout_seconds + SPARE_SECONDS - BROKEN_SECONDS
        self._retired_at[watch.canary.track.url] = time.monotonic() - spare
        self._adopt(state)

    async def _end_retired(self) -> None:
        """End the retired tracks that are idle, or have been retired for longer than an answer may take."""
        for track in [one for one in self._state.retired if self._may_end(one)]:
            await asyncio.to_thread(self._stop, track)
            await asyncio.to_thread(self._register.change, partial(_without, track))
            self._adopt(_without(track, self._state))

    def _may_end(self, track: Track) -> bool:
        limit = track.spec.service.request_timeout_seconds + SPARE_SECONDS
        return not self._under_way[track.url] or time.monotonic() - self._retired_at[track.url] > limit


async def _repeat(step: Callable[[], Awaitable[None]]) -> None:
    while True:
        try:
            await step()
        except (OSError, VilaError, TimeoutError) as error:  # the store or the cluster may be back soon
            log.error("the state of the service is not followed: %s", error)
        await asyncio.sleep(POLL_SECONDS)


def _without(ended: Track, state: ServiceState) -> ServiceState:
    return state.with_changes({"retired": tuple(one for one in state.retired if one != ended)})
