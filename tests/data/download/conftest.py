"""A real server on the loopback that does what a plan says: good images, and every fault of the web that we know."""

import asyncio
import gzip
import io
import socket
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from vila_ops.config.download import DownloadSettings

MAX_BYTES = 200_000
ATTEMPTS = 3
READ_SECONDS = 2.0
DEADLINE_SECONDS = 3.0

Send = Callable[[asyncio.StreamWriter, "Case", int], Awaitable[None]]


@dataclass(frozen=True)
class Case:
    """One URL, what the server does when it is asked for, and so what must be written down."""

    kind: str
    number: int
    send: Send
    body: bytes
    outcome: str
    status: int | None = 200
    requests: int = 1
    """That the server sees of its path."""
    moved_to: str | None = None
    """The final path, where that is not its own."""

    @property
    def path(self) -> str:
        """Its own alone."""
        return f"/{self.kind}/{self.number}"

    @property
    def host(self) -> str:
        """Shared by the same kind, so that a slow kind holds up itself."""
        return f"{self.kind.replace('_', '-')}.test"

    def url(self, port: int) -> str:
        """As it stands in the data."""
        return f"http://{self.host}:{port}{self.path}"


def image(format: str, number: int) -> bytes:
    """A small image, different for each number."""
    noise = np.random.default_rng(number).integers(0, 256, (16 + number % 48, 16 + number % 31, 3), np.uint8)
    out = io.BytesIO()
    Pillow.fromarray(noise).save(out, format)
    return out.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces its size and holds no pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def answer(status: int, body: bytes, *headers: str, length: int | None = None) -> bytes:
    """An HTTP/1.1 answer."""
    lines = [f"HTTP/1.1 {status} Said", f"Content-Length: {len(body) if length is None else length}", *headers]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def says(status: int, *headers: str, length: int | None = None) -> Send:
    """Answers the same every time."""

    async def send(writer: asyncio.StreamWriter, case: Case, seen: int) -> None:
        writer.write(answer(status, case.body, *headers, length=length))
        if length is not None:
            writer.close()

    return send


def first(status: int, *headers: str) -> Send:
    """Fails the first time, and then gives the image."""

    async def send(writer: asyncio.StreamWriter, case: Case, seen: int) -> None:
        writer.write(answer(status, b"later", *headers) if seen == 1 else answer(200, case.body))

    return send


def moves(status: int, to: str) -> Send:
    """Redirects; `{number}` and `{host}` are the case's own, `{port}` the server's."""

    async def send(writer: asyncio.StreamWriter, case: Case, seen: int) -> None:
        port = writer.get_extra_info("sockname")[1]
        writer.write(answer(status, b"", "Location: " + to.format(number=case.number, host=case.host, port=port)))

    return send


async def trickles(writer: asyncio.StreamWriter, case: Case, seen: int) -> None:
    """The whole image, in twice the time that there is, and never silent for long."""
    writer.write(answer(200, b"", length=len(case.body)))
    step = len(case.body) // 60 + 1
    for start in range(0, len(case.body), step):
        await asyncio.sleep(2 * DEADLINE_SECONDS / 60)
        writer.write(case.body[start : start + step])
        await writer.drain()


async def trickles_headers(writer: asyncio.StreamWriter, case: Case, seen: int) -> None:
    """The same, in its headers."""
    writer.write(b"HTTP/1.1 200 OK\r\n")
    for number in range(60):
        await asyncio.sleep(2 * DEADLINE_SECONDS / 60)
        writer.write(b"X-%d: x\r\n" % number)
        await writer.drain()
    writer.write(b"Content-Length: %d\r\n\r\n" % len(case.body) + case.body)


async def stops(writer: asyncio.StreamWriter, case: Case, seen: int) -> None:
    writer.write(answer(200, case.body[: len(case.body) // 2], length=len(case.body)))
    await asyncio.sleep(2 * DEADLINE_SECONDS)


async def is_silent(writer: asyncio.StreamWriter, case: Case, seen: int) -> None:
    await asyncio.sleep(2 * DEADLINE_SECONDS)


async def resets(writer: asyncio.StreamWriter, case: Case, seen: int) -> None:
    writer.write(answer(200, case.body[:100], length=len(case.body)))
    await writer.drain()
    linger = struct.pack("ii", 1, 0)  # RST instead of FIN
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


async def closes(writer: asyncio.StreamWriter, case: Case, seen: int) -> None:
    writer.close()


async def talks_nonsense(writer: asyncio.StreamWriter, case: Case, seen: int) -> None:
    writer.write(b"SSH-2.0-OpenSSH_9.2\r\n")
    writer.close()


async def never_ends(writer: asyncio.StreamWriter, case: Case, seen: int) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(50 * MAX_BYTES // 10_000):
        writer.write(b"2710\r\n" + bytes(10_000) + b"\r\n")
        await writer.drain()


async def in_chunks(writer: asyncio.StreamWriter, case: Case, seen: int) -> None:
    halves = (case.body[:50], case.body[50:])
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(half), half) for half in halves)
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")


HTML = b"<!doctype html><title>Not here</title>" + b"<p>This image has moved.</p>" * 20
SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
GZIP_BOMB = gzip.compress(bytes(50_000_000))
FORMATS = ("png", "jpeg", "webp", "gif", "bmp")
FORBIDDEN = ("http://127.0.0.2:{port}/x", "http://[::1]:{port}/x", "http://169.254.169.254/latest", "http://10.0.0.1/x")
# kind -> (sender, body of a number or None for a PNG, outcome, more)
KINDS: dict[str, tuple[Send, Callable[[int], bytes] | None, str, dict[str, Any]]] = {
    **{f"ok_{name}": (says(200), lambda i, f=name: image(f, i), "ok", {}) for name in FORMATS},
    "ok_chunked": (in_chunks, None, "ok", {}),
    "lying_html": (says(200, "Content-Type: text/html"), None, "ok", {}),
    "flaky": (first(500), None, "ok", {"requests": 2}),
    "limited": (first(429, "Retry-After: 0"), None, "ok", {"requests": 2}),
    "moved": (moves(301, "http://ok-png.test:{port}/ok_png/{number}"), None, "ok", {"moved_to": "/ok_png/{number}"}),
    "moved_here": (moves(307, "../ok_png/{number}?a=b c#d"), None, "ok", {"moved_to": "/ok_png/{number}?a=b%20c#d"}),
    "missing": (says(404), lambda i: HTML, "not_found", {"status": 404}),
    "gone": (says(410), lambda i: HTML, "not_found", {"status": 410}),
    "forbidden": (says(403), lambda i: HTML, "client_error", {"status": 403}),
    "failing": (says(500), lambda i: HTML, "server_error", {"status": 500, "requests": ATTEMPTS}),
    "always_limited": (says(429), lambda i: b"", "rate_limited", {"status": 429, "requests": ATTEMPTS}),
    "partial": (says(206), None, "unexpected_status", {"status": 206}),
    "reset": (resets, lambda i: image("BMP", i), "reset", {"requests": ATTEMPTS}),
    "closed": (closes, None, "reset", {"status": None, "requests": ATTEMPTS}),
    "nonsense": (talks_nonsense, None, "reset", {"status": None, "requests": ATTEMPTS}),
    "cut": (says(200, length=100_000), None, "reset", {"requests": ATTEMPTS}),
    "loop": (moves(302, "/loop/{number}"), None, "redirect_refused", {"status": 302, "requests": 6}),
    "nowhere": (says(302), lambda i: b"", "redirect_refused", {"status": 302}),
    "to_file": (moves(302, "file:///etc/passwd"), None, "redirect_refused", {"status": 302}),
    "to_userinfo": (moves(302, "http://ok-png.test@127.0.0.2:{port}/"), None, "redirect_refused", {"status": 302}),
    **{
        f"to_private_{number}": (moves(302, to), None, "redirect_refused", {"status": None, "moved_to": to})
        for number, to in enumerate(FORBIDDEN)
    },
    "lying_jpeg": (says(200, "Content-Type: image/jpeg"), lambda i: HTML, "not_an_image", {}),
    "empty": (says(200, "Content-Type: image/png"), lambda i: b"", "not_an_image", {}),
    "svg": (says(200, "Content-Type: image/svg+xml"), lambda i: SVG, "not_an_image", {}),
    "gzip_bomb": (says(200, "Content-Encoding: gzip"), lambda i: GZIP_BOMB, "not_an_image", {}),
    "truncated": (says(200), lambda i: image("JPEG", i)[:-200], "broken_image", {}),
    "short_length": (says(200, length=500), lambda i: image("PNG", i + 20), "broken_image", {}),
    "pixel_bomb": (says(200), lambda i: png_header(30_000, 30_000), "too_many_pixels", {}),
    "pixel_bomb_small": (says(200), lambda i: png_header(1_001, 1_000), "too_many_pixels", {}),
    "announced": (says(200, length=10**12), None, "too_large", {}),
    "endless": (never_ends, None, "too_large", {}),
}
SLOW_KINDS: dict[str, tuple[Send, Callable[[int], bytes] | None, str, dict[str, Any]]] = {
    "busy": (first(503, "Retry-After: 1"), None, "ok", {"requests": 2}),
    "trickle": (trickles, None, "timeout", {"requests": ATTEMPTS}),
    "trickle_headers": (trickles_headers, None, "timeout", {"status": None, "requests": ATTEMPTS}),
    "stopped": (stops, None, "timeout", {"requests": ATTEMPTS}),
    "silent": (is_silent, None, "timeout", {"status": None, "requests": ATTEMPTS}),
}


def make_plan(count: int) -> list[Case]:
    """So many cases of every kind in turn; of those that take seconds fewer, and at least two each."""
    slow = [(kind, number) for kind in SLOW_KINDS for number in range(max(2, count // 1000))]
    per_kind, more = divmod(count - len(slow), len(KINDS))
    fast = [(kind, number) for number in range(per_kind + 1) for kind in KINDS][: per_kind * len(KINDS) + more]
    return [_case(kind, number) for kind, number in [*slow, *fast]]


def _case(kind: str, number: int) -> Case:
    send, body, outcome, more = {**KINDS, **SLOW_KINDS}[kind]
    if "moved_to" in more:
        more = {**more, "moved_to": more["moved_to"].replace("{number}", str(number))}
    return Case(kind, number, send, body(number) if body else image("PNG", number), outcome, **more)


class FaultyServer:
    """Serves plans from a thread; counts requests by path and looks how many of a host are in flight."""

    def __init__(self) -> None:
        self.cases: dict[str, Case] = {}
        self.seen: Counter[str] = Counter()
        self.most_in_flight: Counter[str] = Counter()
        self.heads: list[str] = []
        self.delay_seconds = 0.0
        self.port = 0
        self._in_flight: Counter[str] = Counter()
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        self._started.wait()

    def plan(self, cases: list[Case], *, delay_seconds: float = 0.0) -> list[str]:
        """Start again with these cases, and their URLs."""
        self.cases = {case.path: case for case in cases}
        self.seen, self.most_in_flight, self.heads = Counter(), Counter(), []
        self.delay_seconds = delay_seconds
        return [case.url(self.port) for case in cases]

    def close(self) -> None:
        """End the thread."""
        self._loop.call_soon_threadsafe(self._stop.cancel)
        self._thread.join()

    def _serve(self) -> None:
        async def serve() -> None:
            server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
            self.port = server.sockets[0].getsockname()[1]
            self._stop = asyncio.ensure_future(server.serve_forever())
            self._started.set()
            await asyncio.wait([self._stop])
            connections = asyncio.all_tasks() - {asyncio.current_task()}
            for task in connections:
                task.cancel()
            await asyncio.gather(*connections, return_exceptions=True)

        self._loop.run_until_complete(serve())
        self._loop.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while not writer.is_closing():
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                path = head.split(" ")[1].partition("?")[0]
                host = head.lower().partition("\r\nhost: ")[2].partition(":")[0]
                self.heads.append(head)
                self.seen[path] += 1
                self._in_flight[host] += 1
                self.most_in_flight[host] = max(self.most_in_flight[host], self._in_flight[host])
                try:
                    await asyncio.sleep(self.delay_seconds)
                    case = self.cases[path]
                    await case.send(writer, case, self.seen[path])
                    await writer.drain()
                finally:
                    self._in_flight[host] -= 1
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client has gone, or the test is over
        finally:
            writer.close()


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    """One server a test."""
    server = FaultyServer()
    yield server
    server.close()


@pytest.fixture
def case() -> Callable[..., Case]:
    """One case of a kind."""

    def make(kind: str, number: int = 0) -> Case:
        return _case(kind, number)

    return make


@pytest.fixture
def plan() -> Callable[[int], list[Case]]:
    """So many cases."""
    return make_plan


@pytest.fixture
def make_settings(server: FaultyServer) -> Callable[..., DownloadSettings]:
    """Quick, and allowed to ask this server and nothing else of the loopback."""

    def make(**more: Any) -> DownloadSettings:
        return DownloadSettings.model_validate(
            {
                "per_host_per_second": 500,
                "read_seconds": READ_SECONDS,
                "deadline_seconds": DEADLINE_SECONDS,
                "attempts": ATTEMPTS,
                "backoff_seconds": 0.05,
                "host_failures": 1_000_000,
                "max_bytes": MAX_BYTES,
                "max_pixels": 1_000_000,
                "ports": [80, 443, server.port],
                "allow_addresses": ["127.0.0.1/32"],
                **more,
            }
        )

    return make


@pytest.fixture
def names() -> Callable[[str, int], Awaitable[list[str]]]:
    """Every name is this machine; an address is itself."""

    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"] if host.endswith(".test") else [host]

    return resolve
