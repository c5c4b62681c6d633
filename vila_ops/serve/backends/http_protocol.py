"""HTTP of the inline server: uvicorn's protocol with limits on headers, which it has not by itself."""

import asyncio
from asyncio import TimerHandle
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from vila_ops import logs

HEADER_SECONDS = 10.0
"""Longest time from the first byte of a connection, or of its next request, to the end of the headers."""
MAX_HEADER_BYTES = 64 * 2**10
MAX_HEADERS = 100
MAX_CONNECTIONS = 1000


class LimitedHttp(HttpToolsProtocol):
    """Closes connections whose headers take too long or too much, and those beyond a number of them."""

    _header_timer: TimerHandle | None = None
    _body_timer: TimerHandle | None = None
    """Runs while the rest of a body arrives whose request was answered before its end."""
    _header_bytes = 0
    _in_body = _answering = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time of the headers."""
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            self._refuse(503, "too many connections")
        else:
            self._start_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """End all times."""
        self._stop_timers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count bytes that come before the headers have ended."""
        if self.transport.is_closing():
            return
        if self._header_timer is None and not self._in_body:
            self._start_header_timer()
        self._header_bytes += len(data)
        super().data_received(data)
        if self._header_timer is not None and self._header_bytes > MAX_HEADER_BYTES:
            self._refuse(431, "the headers have too many bytes")

    def on_headers_complete(self) -> None:
        """Pass on a request whose headers are within the limits."""
        self._stop_timers()
        self._in_body = True
        length = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if len(self.headers) > MAX_HEADERS or length > MAX_HEADER_BYTES:
            self._refuse(431, "the headers are too long or too many")
        else:
            self._answering = True
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Drop the body of a refused request."""
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request that was not refused."""
        self._stop_timers()
        self._in_body = False
        if not self.transport.is_closing():
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """Give the rest of an unread body some time, since a connection that closes at once may lose the response."""
        self._answering = False
        super().on_response_complete()
        if self._in_body and not self.transport.is_closing():
            self._body_timer = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _start_header_timer(self) -> None:
        self._header_bytes = 0
        self._header_timer = self.loop.call_later(HEADER_SECONDS, self._headers_are_late)

    def _headers_are_late(self) -> None:
        if self._answering:
            self._start_header_timer()  # of a request that follows one which is still answered
        else:
            self._refuse(408, "the headers took too long to arrive")

    def _stop_timers(self) -> None:
        for timer in (self._header_timer, self._body_timer):
            if timer is not None:
                timer.cancel()
        self._header_timer = self._body_timer = None

    def _refuse(self, status: int, text: str) -> None:
        self._stop_timers()
        head = b"content-type: text/plain\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(text)
        self.transport.write(STATUS_LINE[status] + head + text.encode())
        self.transport.close()


def options() -> dict[str, Any]:
    """Options of uvicorn for this protocol."""
    own = {"http": LimitedHttp, "ws": "none", "access_log": False, "server_header": False}
    return {**own, "log_config": None} if logs.as_json() else own  # else uvicorn writes text beside our lines
