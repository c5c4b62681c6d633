"""Requests to the replicas of a track through an ASGI app of this process, which has the routes of all tracks."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Scope

from vila_ops.serve.app.errors import ApiError, ClientGone
from vila_ops.serve.router.request import Incoming
from vila_ops.serve.router.state import Track
from vila_ops.serve.router.upstream import SPARE_SECONDS, ReplicaLost, Reply, reply_of

MAX_WAITING = 16
"""Messages of a response that the app may be ahead of the client."""
log = logging.getLogger(__name__)


class AsgiUpstream:
    """Implements `Upstream` by calls of an app, each in a task of its own."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._calls: set[asyncio.Task[None]] = set()
        """Those that have not ended, some of them because their client has just left."""

    async def close(self) -> None:
        """As in `Upstream`: nothing is kept."""

    @asynccontextmanager
    async def ask(self, track: Track, request: Incoming) -> AsyncIterator[Reply]:
        """As in `Upstream`. A track whose route the app does not have was not reached."""
        prefix, asked = urlsplit(track.url).path, request.scope
        raw_path = prefix.encode() + (asked.get("raw_path") or asked["path"].encode())
        headers = request.upstream_headers()
        scope = {**asked, "path": prefix + asked["path"], "raw_path": raw_path, "headers": headers}
        seconds = track.spec.service.request_timeout_seconds + SPARE_SECONDS
        async with self._called(scope, request.body(), seconds=seconds) as reply:
            if reply.status == 404 and not reply.is_json():
                raise ReplicaLost(f"there is no route {prefix}", reached=False)
            yield reply

    async def ready(self, track: Track, *, seconds: float) -> int | None:
        """As in `Upstream`."""
        try:
            return (await self.get(f"{urlsplit(track.url).path}/ready", seconds=seconds)).status
        except ReplicaLost:
            return None

    async def get(self, path: str, *, seconds: float) -> Reply:
        """The response to GET of a path; the app may be silent for so long. Raises ReplicaLost."""
        scope: Scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "method": "GET",
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": [],
            "client": None, "server": None,
        }  # fmt: skip
        async with self._called(scope, _nothing(), seconds=seconds) as reply:
            return reply

    @asynccontextmanager
    async def _called(self, scope: Scope, body: AsyncIterator[bytes], *, seconds: float) -> AsyncIterator[Reply]:
        """The response of the app, which may be silent for so long."""
        call = _Call(body, seconds)
        task = asyncio.create_task(call.run(self._app, scope))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        try:
            start = await call.next()
            yield await reply_of(start["status"], list(start["headers"]), call.chunks())
        finally:
            call.leave()


async def _nothing() -> AsyncIterator[bytes]:
    """The body of a request that has none."""
    for chunk in list[bytes]():
        yield chunk


class _Call:
    """One request to an app, and its response."""

    def __init__(self, body: AsyncIterator[bytes], seconds: float) -> None:
        self._body, self._seconds, self._uploading = body, seconds, True
        self._messages: asyncio.Queue[Message | None] = asyncio.Queue(MAX_WAITING)
        self._left = asyncio.Event()
        self._problem: Exception | None = None
        """Why the request was not sent to its end."""

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        """Call the app, whatever becomes of it."""
        try:
            await app(scope, self._receive, self._send)
        except Exception:
            log.exception("the app failed below %s", scope["path"])
        finally:
            await self._send(None)

    async def next(self) -> Message:
        """The next message of the response. Raises ReplicaLost, and what kept the request from being sent."""
        try:
            async with asyncio.timeout(self._seconds):
                message = await self._messages.get()
        except TimeoutError:
            raise ReplicaLost(f"it said nothing for {self._seconds:.0f} seconds", reached=True) from None
        if message is None:
            raise self._problem or ReplicaLost("the response broke off", reached=True)
        return message

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body of the response. Raises ReplicaLost."""
        more = True
        while more:
            message = await self.next()
            more = message.get("more_body", False)
            if chunk := message.get("body", b""):
                yield chunk

    def leave(self) -> None:
        """Tell the app that the client has left, and drop what it still sends."""
        self._left.set()
        while not self._messages.empty():
            self._messages.get_nowait()

    async def _send(self, message: Message | None) -> None:
        if self._left.is_set():
            await asyncio.sleep(0)  # an app that sends on has to let others run
        else:
            await self._messages.put(message)

    async def _receive(self) -> dict[str, Any]:
        if self._uploading:
            try:
                return {"type": "http.request", "body": await anext(self._body), "more_body": True}
            except StopAsyncIteration:
                self._uploading = False
                return {"type": "http.request", "body": b"", "more_body": False}
            except (ClientGone, ApiError) as error:
                self._problem, self._uploading = error, False
                return {"type": "http.disconnect"}
        await self._left.wait()
        return {"type": "http.disconnect"}
