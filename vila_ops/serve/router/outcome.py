"""What came of a request: read from the response as it passes through the router."""

import json
import time
import zlib
from typing import Any

MAX_KEPT = 2**20
"""Bytes of a response, and of a line of a stream, that are looked at."""
REPEATS = 0.1
"""Compressed size over size below which an answer repeats itself; English prose has about 0.5."""
LONG_ENOUGH = 200
"""Characters of an answer that can be said to repeat itself."""


class ResponseOutcome:
    """Success, time and text of one response."""

    def __init__(self, *, read: bool) -> None:
        self.failed = False
        """A fault of the server: status 5xx, an error event, or a response that broke off."""
        self.refused = False
        """Status 4xx."""
        self.left = False
        """Whether the client left before the end."""
        self.seconds: float | None = None
        self._read, self._text = read, ""
        self._started, self._rest = time.monotonic(), b""

    def answered(self, status: int) -> None:
        """The response begins."""
        self.failed |= status >= 500
        self.refused |= 400 <= status < 500

    @property
    def length(self) -> int:
        """Characters of the answer."""
        return len(self._text)

    @property
    def degenerate(self) -> bool:
        """Whether the answer is empty or repeats itself."""
        text = self._text.encode()
        repeats = len(text) >= LONG_ENOUGH and len(zlib.compress(text)) < REPEATS * len(text)
        return not self._text.strip() or repeats

    def ended(self) -> None:
        """The response has ended, or the client left."""
        self.seconds = time.monotonic() - self._started

    def whole(self, body: bytes) -> None:
        """Read a response that is no stream."""
        if self._read and len(body) <= MAX_KEPT:
            self._add(_json(body), "message")

    def streamed(self, chunk: bytes) -> None:
        """Read a piece of a stream."""
        if not self._read:
            return
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        self._rest = self._rest[-MAX_KEPT:]
        for line in lines:
            if line.startswith(b"data: {"):
                self._add(_json(line[6:]), "delta")

    def _add(self, value: Any, part: str) -> None:
        if not isinstance(value, dict):
            return
        self.failed |= "error" in value
        for choice in value.get("choices") or ():
            self._text += (choice.get(part) or {}).get("content") or ""


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None
