"""What one replica takes on: bodies within time and memory, and answers within its queue and the limits of each key."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.requests import ClientDisconnect, Request

from vila_ops.config.serve import RequestLimits
from vila_ops.serve.app.errors import ApiError, ClientGone, overloaded
from vila_ops.serve.app.keys import ApiKey
from vila_ops.serve.app.metrics import Metrics

MIB = 2**20
OTHERS_FREE = 3
"""A key may have so many times the places that are still free (the dynamic threshold of Choudhury and Hahne, 1998): one
alone has three quarters of all, and leaves the others to keys that come later."""


class Uploads:
    """Bodies that are being received. One that takes too long ends alone, however many there are."""

    def __init__(self, limits: RequestLimits, metrics: Metrics, *, max_body_bytes: int) -> None:
        self._limits, self._metrics, self._max_body_bytes = limits, metrics, max_body_bytes
        self._held = 0
        self._timeouts: dict[int, asyncio.Timeout] = {}
        """Of each upload, the oldest first."""

    async def read(self, request: Request) -> bytes:
        """The body. Raises ApiError 413 for a long one, 408 for a slow one, and ClientGone."""
        self._metrics.uploads.inc()
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.upload_seconds) as timeout:
                self._timeouts[id(body)] = timeout
                await self._receive(request, body, timeout)
        except TimeoutError:
            text = "the body took too long to arrive; send fewer or smaller images, or try again"
            raise ApiError(408, text, code="upload_timeout", headers={"Connection": "close"}) from None
        except ClientDisconnect:
            raise ClientGone from None
        finally:
            self._timeouts.pop(id(body), None)
            self._held -= len(body)
            self._metrics.uploads.dec()
        return bytes(body)

    async def _receive(self, request: Request, body: bytearray, timeout: asyncio.Timeout) -> None:
        text = f"the body has more than {self._max_body_bytes} bytes; send fewer or smaller images"
        too_large = ApiError(413, text, code="request_too_large")
        stated = request.headers.get("content-length", "")
        if stated.isdecimal() and int(stated[:20]) > self._max_body_bytes:
            raise too_large
        loop = asyncio.get_running_loop()
        started = loop.time()
        async for chunk in request.stream():
            if timeout.expired():
                raise TimeoutError
            body += chunk
            self._held += len(chunk)
            if len(body) > self._max_body_bytes:
                raise too_large
            if self._held > self._limits.held_bytes:
                oldest = next(one for one in self._timeouts.values() if not one.expired())
                oldest.reschedule(loop.time())
            else:
                timeout.reschedule(started + self._limits.upload_seconds + len(body) / MIB)


class Bucket:
    """So much a minute, of which what was not used for a minute at most is saved."""

    def __init__(self, per_minute: int) -> None:
        self.limit, self._level, self._at = per_minute, float(per_minute), time.monotonic()

    def level(self) -> float:
        """What may be taken now."""
        now = time.monotonic()
        self._level = min(self.limit, self._level + (now - self._at) * self.limit / 60)
        self._at = now
        return self._level

    def take(self, amount: float) -> None:
        """Take an amount; a negative one is given back."""
        self._level = min(self.limit, self.level() - amount)

    def wait_seconds(self, amount: float) -> float:
        """How long until so much may be taken."""
        return max(0.0, (amount - self.level()) * 60 / self.limit)


class _Usage:
    """What a key uses."""

    def __init__(self, key: ApiKey) -> None:
        self.key, self.running = key, 0
        self.requests: Bucket | None = None
        self.tokens: Bucket | None = None

    def limit_by(self, key: ApiKey) -> None:
        """Take over limits that were changed in the file."""
        self.key = key
        self.requests = _bucket(self.requests, key.requests_per_minute)
        self.tokens = _bucket(self.tokens, key.tokens_per_minute)

    def check_requests(self) -> None:
        """Raise ApiError 429 if there is no request left."""
        if self.requests and (wait := self.requests.wait_seconds(1)):
            text = f"this key may send {self.requests.limit} requests a minute; wait for Retry-After"
            raise overloaded(text, code="rate_limit_exceeded", wait_seconds=wait)

    def take_request(self) -> None:
        """Count a request."""
        if self.requests:
            self.requests.take(1)


def _bucket(bucket: Bucket | None, per_minute: int | None) -> Bucket | None:
    if per_minute is None or (bucket and bucket.limit == per_minute):
        return bucket if per_minute else None
    return Bucket(per_minute)


@dataclass
class Ticket:
    """The right to so many answers, until `close`."""

    answers: int
    _release: Callable[[], None]
    _charge: Callable[[int], None]
    _charged: int = 0
    _closed: bool = field(default=False, repr=False)

    def charge(self, tokens: int) -> None:
        """Count tokens against the limit of the key: those that the request may have at most.

        Raises ApiError 429 if the key has too few left, and 400 if it never has as many.
        """
        self._charge(tokens)
        self._charged = tokens

    def close(self, *, used: int = 0) -> None:
        """Give the places back, and the tokens that were not used. A second call changes nothing."""
        if not self._closed:
            self._closed = True
            if self._charged:
                self._charge(min(used, self._charged) - self._charged)
            self._release()


class Admission:
    """Answers under way: as many as the batch and the queue take, each key within its limits."""

    def __init__(self, limits: RequestLimits, metrics: Metrics, *, max_batch: int) -> None:
        self._most, self._metrics = max_batch + limits.max_waiting, metrics
        self._running = 0
        self._usage: dict[str, _Usage] = {}

    def admit(self, key: ApiKey | None, *, answers: int) -> Ticket:
        """Take places for a request. Raises ApiError 429 with the time after which to try again."""
        usage = self._usage_of(key) if key else None
        if usage:
            usage.check_requests()
        if usage and (most := usage.key.max_concurrent) and usage.running + answers > most:
            text = f"this key may have {most} answers under way; wait until one has ended"
            raise overloaded(text, code="rate_limit_exceeded", wait_seconds=1)
        if self._running + answers > self._most:
            text = f"{self._running} answers are under way or wait; wait for Retry-After"
            raise overloaded(text, code="queue_full", wait_seconds=1)
        if usage and usage.running + answers > OTHERS_FREE * (self._most - self._running):
            text = f"this key has {usage.running} answers under way, and what is free is for others; wait for one"
            raise overloaded(text, code="queue_full", wait_seconds=1)
        if usage:
            usage.take_request()
        self._count(usage, answers)
        return Ticket(answers, lambda: self._count(usage, -answers), lambda tokens: _charge(usage, tokens))

    def count(self, key: ApiKey | None) -> None:
        """Count a request without an answer. Raises ApiError 429 with the time after which to try again."""
        if key:
            usage = self._usage_of(key)
            usage.check_requests()
            usage.take_request()

    def headers(self, key: ApiKey | None) -> dict[str, str]:
        """The limits of a key and what is left of them, as OpenAI's API names them."""
        usage = self._usage.get(key.id) if key else None
        made: dict[str, str] = {}
        for name, bucket in (("requests", usage and usage.requests), ("tokens", usage and usage.tokens)):
            if bucket:
                made[f"x-ratelimit-limit-{name}"] = str(bucket.limit)
                made[f"x-ratelimit-remaining-{name}"] = str(max(0, int(bucket.level())))
        return made

    def _count(self, usage: _Usage | None, answers: int) -> None:
        self._running += answers
        self._metrics.answers.set(self._running)
        if usage:
            usage.running += answers

    def _usage_of(self, key: ApiKey) -> _Usage:
        usage = self._usage.setdefault(key.id, _Usage(key))
        usage.limit_by(key)
        return usage


def _charge(usage: _Usage | None, tokens: int) -> None:
    bucket = usage.tokens if usage else None
    if bucket is None:
        return
    if tokens > bucket.limit:
        text = f"the request may have {tokens} tokens, but this key {bucket.limit} a minute; lower max_tokens"
        raise ApiError(400, text, param="max_tokens", code="invalid_value")
    if tokens > 0 and (wait := bucket.wait_seconds(tokens)):
        text = f"this key may have {bucket.limit} tokens a minute, and this request {tokens}; wait for Retry-After"
        raise overloaded(text, code="rate_limit_exceeded", wait_seconds=wait)
    bucket.take(tokens)
