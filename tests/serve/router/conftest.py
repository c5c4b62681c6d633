"""A router on a real port, before replicas on real ports whose answers a test writes."""

import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from vila_ops.artifacts.kinds import Checkpoint, ModelVersion
from vila_ops.config import CanaryRules, Resources, Service
from vila_ops.serve.backends.http_protocol import options
from vila_ops.serve.backends.local_process import LocalProcess
from vila_ops.serve.backends.ray_serve import Below
from vila_ops.serve.router.app import Router
from vila_ops.serve.router.asgi_upstream import AsgiUpstream
from vila_ops.serve.router.state import Canary, Register, ServiceState, Track
from vila_ops.serve.router.upstream import HttpUpstream, Upstream
from vila_ops.serve.spec import Spec

SERVICE = Service(name="tiny", request_timeout_seconds=20, max_body_bytes=200_000)

Respond = Callable[[Scope, bytes, Send], Awaitable[None]]


@contextmanager
def listening(app: ASGIApp, **more: bool) -> Iterator[str]:
    """The URL of an app on a free port."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", **options(), **more))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join()


class Replica:
    """Answers chats with its name, or as a test says."""

    def __init__(self, name: str) -> None:
        self.name, self.status = name, 200
        self.bodies: list[bytes] = []
        self.headers: list[dict[bytes, bytes]] = []
        self.gone = 0
        """Requests whose client left."""
        self.respond: Respond = self.say_name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        if scope["path"] == "/ready":
            await answer(send, self.status, {})
            return
        self.bodies.append(body)
        self.headers.append(dict(scope["headers"]))
        scope["receive"] = receive
        await self.respond(scope, body, send)

    async def say_name(self, scope: Scope, body: bytes, send: Send) -> None:
        await answer(send, 200, completion(self.name))


def completion(text: str) -> dict[str, Any]:
    """The body of an answer."""
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}


async def answer(send: Send, status: int, body: dict[str, Any]) -> None:
    """Send JSON."""
    await _send_whole(send, status, json.dumps(body).encode(), b"application/json")


async def plain(send: Send, status: int, text: bytes) -> None:
    """Send text."""
    await _send_whole(send, status, text, b"text/plain; charset=utf-8")


async def _send_whole(send: Send, status: int, data: bytes, kind: bytes) -> None:
    headers = [(b"content-type", kind), (b"content-length", str(len(data)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})


class Proxy:
    """Passes a request on to the app whose prefix it has, or says 404 as Ray Serve's proxy does."""

    def __init__(self, apps: dict[str, ASGIApp]) -> None:
        self._apps = {prefix: Below(prefix, app) for prefix, app in apps.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        prefix = f"/{scope['path'].split('/')[1]}"
        if prefix in self._apps:
            await self._apps[prefix](scope, receive, send)
        else:
            await plain(send, 404, b"Path '%s' not found." % prefix.encode())


class Setting:
    """A stable version (number 1), a canary (number 2), and their router, which reaches them by HTTP or as a proxy."""

    def __init__(self, folder: Path, stack: ExitStack, *, in_proxy: bool = False) -> None:
        self.stable, self.canary = Replica("stable"), Replica("canary")
        self.urls = [stack.enter_context(listening(one)) for one in (self.stable, self.canary)]
        upstream: Upstream = HttpUpstream()
        if in_proxy:
            upstream = AsgiUpstream(Proxy({"/stable@1": self.stable, "/canary@2": self.canary}))
            self.urls = [url + prefix for url, prefix in zip(self.urls, ("/stable@1", "/canary@2"), strict=True)]
        self.tracks = [self.track(number, url) for number, url in enumerate(self.urls, 1)]
        self.register = Register(str(folder / "register"))
        self.register.change(lambda _: ServiceState(stable=self.tracks[0]))
        self.stopped: list[Track] = []
        self.stop: Callable[[Track], None] = self.stopped.append
        metrics = LocalProcess("tiny", Resources(launch="inline")).metrics
        router = Router(self.register, lambda track: self.stop(track), metrics, upstream)
        self.url = stack.enter_context(listening(router, proxy_headers=False))

    def track(self, number: int, url: str) -> Track:
        checkpoint = Checkpoint(uri="s3://b/c", digest=f"digest-{number}", parents=(), stage="sft", step=1)
        version = ModelVersion(name="tiny", version=number, checkpoint=checkpoint, promoted=False)
        return Track(spec=Spec.of(SERVICE, version, Resources(launch="inline")), url=url)

    def start_canary(self, **rules: float) -> None:
        """Register the canary, and wait until the router has seen it."""
        canary = Canary(track=self.tracks[1], rules=CanaryRules.model_validate(rules), salt="salt")
        self.register.change(lambda state: state.with_changes({"canary": canary}))
        time.sleep(1)

    def rolled_back(self) -> str:
        """The reason, as soon as the canary is taken back and ended."""
        deadline = time.monotonic() + 30
        while not self.stopped:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        state = self.register.load()
        assert state.canary is None
        assert self.stopped == [self.tracks[1]]
        assert state.rolled_back is not None
        return state.rolled_back.reason


@pytest.fixture
def setting(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Setting]:
    """Ends all servers with the test."""
    with ExitStack() as stack:
        yield Setting(tmp_path, stack, in_proxy=getattr(request, "param", "http") == "proxy")
