"""How the router reaches the replicas of a track: the protocol, and HTTP."""

from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import httpcore

from vila_ops.serve.router.request import NOT_PASSED_ON, Incoming
from vila_ops.serve.router.state import Track

CONNECT_SECONDS = 5.0
IDLE_SECONDS = 2.0
"""How long a connection is kept: less than the servers keep theirs, so that none is used as it closes."""
SPARE_SECONDS = 30.0
"""Beyond the time limit of an answer, before a replica that says nothing counts as lost."""
OWN_HEADERS = {b"date", b"server"}
"""Headers that the router's own server writes."""


class ReplicaLost(Exception):
    """A replica was not reached, or its response broke off."""

    def __init__(self, reason: str, *, reached: bool) -> None:
        super().__init__(reason)
        self.reached = reached
        """Whether a replica may have got the request."""


@dataclass
class Reply:
    """The response of a replica."""

    status: int
    headers: list[tuple[bytes, bytes]]
    content: bytes | AsyncIterator[bytes]
    """Whole, or the chunks of a stream."""

    def is_json(self) -> bool:
        """Whether a replica of ours may have sent it: all its errors are JSON."""
        return any(
            name.lower() == b"content-type" and value.startswith(b"application/json") for name, value in self.headers
        )


class Upstream(Protocol):
    """Passes requests on to the replicas of tracks. For one event loop."""

    def ask(self, track: Track, request: Incoming) -> AbstractAsyncContextManager[Reply]:
        """Send a request to a track; leaving the context ends its response there. Raises ReplicaLost."""

    async def ready(self, track: Track, *, seconds: float) -> int | None:
        """Status of /ready; None where no replica answers in time."""

    async def close(self) -> None:
        """End what is kept between requests."""


async def reply_of(status: int, headers: list[tuple[bytes, bytes]], chunks: AsyncIterator[bytes]) -> Reply:
    """A response without the headers that are not passed on: a stream of events as it comes, any other one whole."""
    dropped = NOT_PASSED_ON | OWN_HEADERS
    headers = [(name, value) for name, value in headers if name.lower() not in dropped]
    kind = next((value for name, value in headers if name.lower() == b"content-type"), b"")
    if kind.startswith(b"text/event-stream"):
        return Reply(status, headers, chunks)
    return Reply(status, headers, b"".join([chunk async for chunk in chunks]))


class HttpUpstream:
    """Implements `Upstream` by connections to all tracks."""

    def __init__(self) -> None:
        self._pool = httpcore.AsyncConnectionPool(
            max_connections=1000, max_keepalive_connections=100, keepalive_expiry=IDLE_SECONDS
        )

    async def close(self) -> None:
        """As in `Upstream`: close all connections."""
        await self._pool.aclose()

    @asynccontextmanager
    async def ask(self, track: Track, request: Incoming) -> AsyncIterator[Reply]:
        """As in `Upstream`."""
        url = httpcore.URL(track.url)
        query = request.scope.get("query_string", b"")
        raw_path = request.scope.get("raw_path") or request.scope["path"].encode()
        target = url.target.rstrip(b"/") + raw_path + (b"?" + query if query else b"")
        seconds = track.spec.service.request_timeout_seconds + SPARE_SECONDS
        outgoing = httpcore.Request(
            request.scope["method"],
            httpcore.URL(scheme=url.scheme, host=url.host, port=url.port, target=target),
            headers=request.upstream_headers(),
            content=request.body(),
            extensions={"timeout": {"connect": CONNECT_SECONDS, "read": seconds, "write": seconds}},
        )
        with _named():
            response = await self._pool.handle_async_request(outgoing)
        try:
            yield await reply_of(response.status, response.headers, _chunks(response))
        finally:
            await response.aclose()

    async def ready(self, track: Track, *, seconds: float) -> int | None:
        """As in `Upstream`."""
        limits = {"connect": seconds, "read": seconds, "write": seconds, "pool": seconds}
        try:
            response = await self._pool.request("GET", f"{track.url}/ready", extensions={"timeout": limits})
        except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError):
            return None
        return response.status


async def _chunks(response: httpcore.Response) -> AsyncIterator[bytes]:
    with _named():
        async for chunk in response.aiter_stream():
            yield chunk


@contextmanager
def _named() -> Iterator[None]:
    """Errors of httpcore as ReplicaLost."""
    try:
        yield
    except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError) as error:
        reached = not isinstance(error, (httpcore.ConnectError, httpcore.ConnectTimeout))
        raise ReplicaLost(repr(error), reached=reached) from error
