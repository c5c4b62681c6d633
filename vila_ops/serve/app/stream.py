"""Responses whose client may leave: what is computed for it then ends. Streams are server-sent events."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vila_ops.serve.app.errors import ApiError, ClientGone, internal_error

T = TypeVar("T")
log = logging.getLogger(__name__)


async def unless_gone(leaving: Coroutine[Any, Any, None], work: Coroutine[Any, Any, T]) -> T:
    """The result of work for a client, where `leaving` returns when it has left.

    Raises ClientGone, and ends the work, if the client leaves first.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(leaving)
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def disconnected(receive: Receive) -> None:
    """Return when a client whose request has been received has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends each value as an event, then `[DONE]`. An error in the middle is an event too, and the last one."""

    media_type = "text/event-stream"

    def __init__(
        self, values: AsyncGenerator[dict[str, Any], None], *, headers: dict[str, str], on_end: Callable[[], None]
    ) -> None:
        self._values, self._on_end = values, on_end
        self.status_code, self.background, self.body = 200, None, b""
        self.init_headers({**headers, "Cache-Control": "no-store"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream until it ends or the client leaves."""
        try:
            with suppress(ClientGone):
                await unless_gone(disconnected(receive), self._send(send))
        finally:
            self._on_end()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._events()) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": b"data: " + event + b"\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncGenerator[bytes, None]:
        try:
            async with aclosing(self._values) as values:
                async for value in values:
                    yield json.dumps(value, ensure_ascii=False).encode()
        except ApiError as error:
            yield json.dumps(error.body()).encode()
        except Exception:
            log.exception("a stream failed")
            yield json.dumps(internal_error().body()).encode()
        else:
            yield b"[DONE]"
