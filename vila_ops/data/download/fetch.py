"""One attempt at one URL: redirects are followed and checked, within limits of time and size, to an image or a failure.

httpcore is the transport of httpx. It is used without httpx's client because it lets us open the connections (see
address.py), and because it has no cookies, proxies or decompression that would have to be turned off.
"""

import asyncio
import email.utils
import os
import ssl
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import httpcore
import httpx

from vila_ops.config.download import DownloadSettings
from vila_ops.data.download.address import CheckedNetwork, Resolve, parse
from vila_ops.data.download.image import image_format
from vila_ops.data.download.outcome import REFUSED, Failure, Outcome

REDIRECTS = (301, 302, 303, 307, 308)
MAX_DETAIL = 200
NETWORK_ERRORS = (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError, ssl.SSLError)
IDLE_SECONDS = 5.0

Headers = Iterable[tuple[bytes, bytes]]


@dataclass(slots=True)
class Attempt:
    """The result of one attempt."""

    final_url: str
    outcome: Outcome = "ok"
    detail: str = ""
    http_status: int | None = None
    retry_after_seconds: float | None = None
    body: bytes = b""
    """The image as the server sent it."""
    extension: str | None = None


class Fetcher:
    """Connections and decoding threads; an async context manager for one event loop."""

    def __init__(self, settings: DownloadSettings, *, resolve: Resolve) -> None:
        self._settings = settings
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=httpx.create_ssl_context(),
            max_connections=settings.concurrency,
            keepalive_expiry=IDLE_SECONDS,
            network_backend=CheckedNetwork(resolve=resolve, allow=settings.allow_addresses),
        )
        self._decoders = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decode")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections and end the threads."""
        await self._pool.aclose()
        self._decoders.shutdown(cancel_futures=True)

    async def body(self, url: str) -> bytes:
        """The bytes that a URL gives, whatever they are. Raises Failure."""
        try:
            async with asyncio.timeout(self._settings.deadline_seconds):
                return await self._follow(Attempt(final_url=url))
        except (TimeoutError, *NETWORK_ERRORS) as error:
            raise _failure(error) from error

    async def attempt(self, url: str) -> Attempt:
        """Request a URL once. Failures of the URL are outcomes, not errors."""
        attempt = Attempt(final_url=url)
        try:
            async with asyncio.timeout(self._settings.deadline_seconds):
                body = await self._follow(attempt)
            loop = asyncio.get_running_loop()  # waiting for a decoder does not count against the server
            attempt.extension = await loop.run_in_executor(
                self._decoders, lambda: image_format(body, max_pixels=self._settings.max_pixels)
            )
            attempt.body = body
        except (Failure, TimeoutError, *NETWORK_ERRORS) as error:
            failure = _failure(error)
            attempt.outcome, attempt.detail = failure.outcome, failure.detail[:MAX_DETAIL]
        return attempt

    async def _follow(self, attempt: Attempt) -> bytes:
        """The body after all redirects; every hop is checked like the first."""
        url = parse(attempt.final_url, ports=self._settings.ports)
        answer = await self._get(url, attempt)
        for _ in range(self._settings.max_redirects):
            if isinstance(answer, bytes):
                return answer
            try:
                url = parse(answer, ports=self._settings.ports, base=url)
                answer = await self._get(url, attempt)
            except Failure as failure:
                if failure.outcome in REFUSED:
                    raise Failure("redirect_refused", f"to a {failure}") from failure
                raise
        if isinstance(answer, bytes):
            return answer
        raise Failure("redirect_refused", f"more than {self._settings.max_redirects} redirects")

    async def _get(self, url: httpx.URL, attempt: Attempt) -> bytes | str:
        """The body, or the target of a redirect."""
        attempt.final_url, attempt.http_status = str(url), None
        async with self._pool.stream(
            "GET",
            httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
            headers={
                b"Host": url.netloc,
                b"User-Agent": self._settings.user_agent,
                b"Accept": b"image/*",
                b"Accept-Encoding": b"identity",
            },
            extensions={
                "timeout": {
                    "connect": self._settings.connect_seconds,
                    "read": self._settings.read_seconds,
                    "write": self._settings.read_seconds,
                }
            },
        ) as response:
            attempt.http_status = response.status
            if response.status in REDIRECTS:
                return _location(response.headers)
            if response.status != 200:
                attempt.retry_after_seconds = _retry_after(response.headers)
                raise Failure(_outcome(response.status), f"status {response.status}")
            return await self._read(response)

    async def _read(self, response: httpcore.Response) -> bytes:
        """The body. A too large announced length refuses it; the received length is counted as well."""
        limit = self._settings.max_bytes
        announced = _header(response.headers, b"content-length") or b""
        if announced.isdigit() and int(announced) > limit:
            raise Failure("too_large", f"announced as more than {limit} bytes")
        body = bytearray()
        async for chunk in response.aiter_stream():
            body += chunk
            if len(body) > limit:
                raise Failure("too_large", f"more than {limit} bytes")
        return bytes(body)


def _failure(error: Exception) -> Failure:
    match error:
        case Failure():
            return error
        case TimeoutError() | httpcore.TimeoutException():
            return Failure("timeout", str(error) or "the attempt took too long")
        case httpcore.ConnectError(args=(ssl.SSLError() as reason, *_)):
            return Failure("tls", str(reason))
        case httpcore.ConnectError():
            return Failure("unreachable", str(error))
        case httpcore.LocalProtocolError():
            return Failure("bad_url", str(error))
        case _:
            return Failure("reset", str(error) or "the connection was reset")


def _outcome(status: int) -> Outcome:
    if status in (404, 410):
        return "not_found"
    if status == 429:
        return "rate_limited"
    if 400 <= status < 500:
        return "client_error"
    return "server_error" if 500 <= status < 600 else "unexpected_status"


def _location(headers: Headers) -> str:
    value = _header(headers, b"location")
    if not value:
        raise Failure("redirect_refused", "without a Location")
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def _retry_after(headers: Headers) -> float | None:
    """Seconds from now, RFC 9110 section 10.2.3: a number of them, or a date."""
    value = (_header(headers, b"retry-after") or b"").decode("latin-1").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _header(headers: Headers, name: bytes) -> bytes | None:
    return next((value for key, value in headers if key.lower() == name), None)
