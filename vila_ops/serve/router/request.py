"""A request that the router passes on: its body, as far as it was read, and the conversation that it belongs to."""

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Receive, Scope

from vila_ops.serve.app.errors import ApiError, ClientGone
from vila_ops.serve.app.stream import disconnected
from vila_ops.serve.app.threads import in_thread_if_long

CHAT = "/v1/chat/completions"
MIB = 2**20
NOT_PASSED_ON = frozenset(
    b"connection keep-alive proxy-connection te trailer transfer-encoding upgrade expect x-forwarded-for "
    b"x-request-disconnect-disabled x-request-timeout-seconds".split()
)
"""Headers of one connection, and those with which a client would lift limits of Ray Serve's proxy."""


class Incoming:
    """A request whose body arrives."""

    def __init__(self, scope: Scope, receive: Receive, *, upload_seconds: float) -> None:
        self.scope, self.headers = scope, Headers(scope=scope)
        self._receive, self._upload_seconds = receive, upload_seconds
        self._started, self._size = time.monotonic(), 0
        self._chunks: list[bytes] = []
        self._uploaded = asyncio.Event()
        self._more = "content-length" in self.headers or "transfer-encoding" in self.headers
        self.replayable = True
        """Whether the request can be sent again: nothing of its body was passed on without being kept."""

    def stated_length(self) -> int | None:
        """The Content-Length."""
        stated = self.headers.get("content-length", "")
        return int(stated) if stated.isdecimal() else None

    def is_chat(self) -> bool:
        """Whether it asks for a chat completion."""
        return (self.scope["method"], self.scope["path"]) == ("POST", CHAT)

    def is_for_metrics(self) -> bool:
        """Whether it asks for what replicas count."""
        return (self.scope["method"], self.scope["path"]) == ("GET", "/metrics")

    def upstream_headers(self) -> list[tuple[bytes, bytes]]:
        """The headers to pass on, with the client's address."""
        kept = [(name, value) for name, value in self.scope["headers"] if name.lower() not in NOT_PASSED_ON]
        client = self.scope.get("client")
        if client:
            kept.append((b"x-forwarded-for", str(client[0]).encode()))
        if "transfer-encoding" in self.headers:
            kept = [(name, value) for name, value in kept if name.lower() != b"content-length"]
            kept.append((b"transfer-encoding", b"chunked"))
        return kept

    async def read_whole(self, *, most: int) -> bytes | None:
        """The body, of so many bytes at most; None for a longer one, of which what was read is kept."""
        async for _ in self._arriving():
            if self._size > most:
                return None
        return b"".join(self._chunks)

    async def body(self) -> AsyncIterator[bytes]:
        """The body from its start. What arrives only now is not kept."""
        for chunk in self._chunks:
            yield chunk
        async for chunk in self._arriving(keep=False):
            yield chunk

    async def client_left(self) -> None:
        """Return when the client has left after its upload."""
        if self._more:
            await self._uploaded.wait()
        await disconnected(self._receive)

    async def _arriving(self, *, keep: bool = True) -> AsyncIterator[bytes]:
        """The chunks that have not arrived yet. Raises ClientGone, and ApiError 408 for a slow upload."""
        while self._more:
            seconds = self._started + self._upload_seconds + self._size / MIB - time.monotonic()
            try:
                async with asyncio.timeout(seconds):
                    message = await self._receive()
            except TimeoutError:
                raise ApiError(408, "the body took too long to arrive", code="upload_timeout") from None
            if message["type"] == "http.disconnect":
                raise ClientGone
            chunk, self._more = message.get("body", b""), message.get("more_body", False)
            self._size += len(chunk)
            if not self._more:
                self._uploaded.set()
            if keep:
                self._chunks.append(chunk)
            else:
                self.replayable = False
            yield chunk


async def conversation_of(body: bytes, headers: Headers) -> bytes | None:
    """What stays the same over the turns of a conversation: the key, `user`, and the messages to the first question.

    None for a body that is not a chat request.
    """
    try:
        chat: Any = await in_thread_if_long(len(body), json.loads, body)
        messages, user = chat["messages"], chat.get("user")
        first = next((index for index, one in enumerate(messages) if one["role"] == "user"), len(messages))
        opening = json.dumps([headers.get("authorization"), user, messages[: first + 1]])
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None
    return opening.encode()


def position_of(conversation: bytes, salt: str) -> int:
    """Where a conversation lies among 2^64 places; which, is known to nobody without the salt."""
    return int.from_bytes(hashlib.blake2b(conversation, digest_size=8, key=salt.encode()[:64]).digest())
