"""Milliseconds that our endpoint adds to a request over a bare app, both behind one Ray Serve proxy.

The engine answers at once, so what is measured is the front (limits, parsing, the chat template, metrics and the
response), alone and behind the router, which runs in Serve's proxy. The bare app reads the JSON and returns a response
of the same form. Requests alternate. Target: 3 ms at the median.
"""

import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import ray
from fastapi import FastAPI, Request
from ray import serve
from result import result
from serving import tiny_version

from vila_ops.config import Resources, Service
from vila_ops.generate.engine import Engine, EngineOptions
from vila_ops.generate.load import load_engine
from vila_ops.generate.request import Delta, Prompt, Sampling
from vila_ops.serve.app.routes import create_app
from vila_ops.serve.backends.local_process import free_port
from vila_ops.serve.backends.ray_serve import Below, RayServe
from vila_ops.serve.router.state import Track
from vila_ops.serve.spec import Spec
from vila_ops.serve.tracks import open_router

COUNT = 300
TARGET_MS = 3.0
TRACK = "/bench@1"
ANSWER = {
    "id": "chatcmpl-0", "object": "chat.completion", "created": 0, "model": "tiny", "system_fingerprint": "0" * 32,
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10},
}  # fmt: skip
bare = FastAPI()


@bare.post("/chat")
async def chat(request: Request) -> dict[str, Any]:
    """A response, whatever was asked."""
    await request.json()
    return ANSWER


class Instant:
    """An engine that answers at once, with the tokenizer and sizes of a real one."""

    def __init__(self, real: Engine) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    async def generate(self, prompt: Prompt, sampling: Sampling, request_id: str) -> AsyncIterator[Delta]:
        """One token."""
        yield Delta([40])
        yield Delta([], "stop")


@serve.deployment
@serve.ingress(bare)
class Bare:
    """The app that every front is measured against."""


class Ours:
    """Our app, as a replica builds it."""

    def __init__(self, spec: str) -> None:
        read = Spec.model_validate_json(spec)
        engine = load_engine(read.version.checkpoint, read.capacity.engine, EngineOptions(device="cpu"))
        self._app = Below(TRACK, create_app(read, Instant(engine), replica={}))  # type: ignore[arg-type]

    def __serve_build_asgi_app__(self) -> Any:
        return self._app


def main() -> None:
    """Measure and write the result."""
    with tempfile.TemporaryDirectory(prefix="vila") as folder:
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
        try:
            times = measured(served(Path(folder), free_port("127.0.0.1", 0)))
        finally:
            serve.shutdown()
            ray.shutdown()
    medians = {name: round(statistics.median(values) * 1000, 3) for name, values in times.items()}
    added = {name: round(medians[name] - medians["bare"], 3) for name in ("front", "routed")}
    result(
        "serve_overhead", ours=medians["routed"], peer=medians["bare"], target=TARGET_MS,
        ok=added["routed"] <= TARGET_MS, unit="ms at the median", added_ms=added, requests=COUNT,
    )  # fmt: skip


def served(root: Path, port: int) -> str:
    """The URL of the router, before a version of a random model, with all defaults; the bare app is beside it."""
    version, url = tiny_version(root), f"http://127.0.0.1:{port}"
    own = {"port": port, "cpus_per_replica": 1}
    given = {"launch": "ray", "ray_address": ray.get_runtime_context().gcs_address, "device": "cpu", "serve": own}
    resources = Resources.model_validate(given | {"storage": {"store": str(root / "store")}})
    spec, backend = Spec.of(Service(name="bench"), version, resources), RayServe("bench", resources)
    track = Track(spec=spec, url=url + TRACK, application="track")
    backend.register.change(lambda state: state.with_changes({"stable": track}))
    backend.open()
    serve.run(serve.deployment(serve.ingress()(Ours)).bind(spec.model_dump_json()), name="track", route_prefix=TRACK)
    serve.run(Bare.bind(), name="bare", route_prefix="/bare")
    return open_router(track, backend)


def measured(url: str) -> dict[str, list[float]]:
    """Seconds of each request, after some that warm up."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Say hello to all of us."}], "max_tokens": 4}
    chat = "/v1/chat/completions"
    paths = {"routed": chat, "front": TRACK + chat, "bare": "/bare/chat"}
    times: dict[str, list[float]] = {name: [] for name in paths}
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        for number in range(COUNT + 30):
            for name, path in paths.items():
                started = time.perf_counter()
                client.post(path, json=body).raise_for_status()
                if number >= 30:
                    times[name].append(time.perf_counter() - started)
    return times


if __name__ == "__main__":
    main()
