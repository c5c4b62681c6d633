"""Endpoints for tests: the real app on a real port, with a real engine or with answers that a test writes."""

import asyncio
import base64
import io
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import uvicorn
from PIL import Image as Pillow

from vila_ops.artifacts.kinds import ModelVersion
from vila_ops.config import Resources, Service
from vila_ops.config.resources import ServeResources
from vila_ops.data.images import Fit
from vila_ops.data.text.conversation import Tokenizer
from vila_ops.generate.engine import Engine
from vila_ops.generate.request import Delta, Prompt, Sampling
from vila_ops.serve.app.routes import create_app
from vila_ops.serve.backends.http_protocol import options
from vila_ops.serve.spec import Spec

SERVICE = Service(name="tiny", max_new_tokens=32, max_images=2, max_image_pixels=10_000, max_body_bytes=100_000)
MODEL = "tiny-vila"
HELLO = [{"role": "user", "content": "Hello"}]

Step = Delta | Exception | float


@contextmanager
def endpoint(version: ModelVersion, engine: Engine, *, service: Service = SERVICE, **serve: Any) -> Iterator[str]:
    """The URL of an endpoint with these resources of `serve`, served as the inline server does."""
    spec = Spec.of(service, version, Resources(launch="inline", serve=ServeResources(max_batch=4, **serve)))
    listener = socket.create_server(("127.0.0.1", 0))
    app = create_app(spec, engine, replica={"pid": 1})
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", **options()))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@cache
def http() -> httpx.Client:
    """One plain client for all tests: making one takes longer than a request."""
    return httpx.Client(timeout=60)


def client_of(url: str, key: str = "none") -> openai.OpenAI:
    """The official client, without retries that hide failures."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)


class ScriptedEngine:
    """An engine with the tokenizer and sizes of a real one, whose answers a test writes."""

    def __init__(self, real: Engine) -> None:
        self._real = real
        self.script: list[Step] = []
        """Deltas of every answer, errors to raise, and seconds to wait."""
        self.asked: list[tuple[Prompt, Sampling]] = []
        self.running = 0
        """Answers that have neither ended nor been given up."""

    @property
    def tokenizer(self) -> Tokenizer:
        return self._real.tokenizer

    @property
    def context_length(self) -> int:
        return self._real.context_length

    @property
    def image_size(self) -> int:
        return self._real.image_size

    @property
    def image_aspect_ratio(self) -> Fit:
        return self._real.image_aspect_ratio

    async def generate(self, prompt: Prompt, sampling: Sampling, request_id: str) -> AsyncIterator[Delta]:
        self.asked.append((prompt, sampling))
        self.running += 1
        try:
            for step in list(self.script):
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, float):
                    await asyncio.sleep(step)
                else:
                    yield step
        finally:
            self.running -= 1

    async def abort(self, request_id: str) -> None:
        raise NotImplementedError

    async def score(self, items: Sequence[Any]) -> Any:
        raise NotImplementedError

    async def hidden_states(self, prompt: Prompt, continuation: list[int]) -> Any:
        raise NotImplementedError

    async def image_features(self, images: Sequence[bytes]) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        pass


def connected(url: str, stack: ExitStack) -> socket.socket:
    """A connection to an endpoint."""
    address = urlsplit(url)
    return stack.enter_context(socket.create_connection((str(address.hostname), int(address.port or 0)), timeout=30))


def upload(url: str, stack: ExitStack, sent: bytes, headers: Mapping[str, str] | None = None) -> socket.socket:
    """A request with 90,000 bytes, of which only these were sent."""
    connection = connected(url, stack)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
    connection.sendall(head.encode() + b"Content-Length: 90000\r\n\r\n" + sent)
    return connection


def wait_until(condition: Any) -> None:
    """Return when a condition holds."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def png(width: int, height: int) -> bytes:
    """A white image."""
    out = io.BytesIO()
    Pillow.new("RGB", (width, height), "white").save(out, "PNG")
    return out.getvalue()


def image_part(url: str | bytes) -> dict[str, Any]:
    """An image part of a message, by its URL or its bytes."""
    if isinstance(url, bytes):
        url = "data:image/png;base64," + base64.b64encode(url).decode()
    return {"type": "image_url", "image_url": {"url": url}}
