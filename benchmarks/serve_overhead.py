"""Milliseconds that our endpoint adds to a request over a bare app, both behind one Ray Serve proxy.

The engine answers at once, so what is measured is the front: limits, parsing, the chat template, metrics and the
response. The bare app reads the JSON and returns a response of the same form. Requests alternate. Target: 3 ms at the
median.
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

from vila_ops.artifacts.kinds import Checkpoint, ModelVersion
from vila_ops.config import Model, Resources, Service
from vila_ops.generate.engine import Engine, EngineOptions
from vila_ops.generate.load import load_engine
from vila_ops.generate.request import Delta, Prompt, Sampling
from vila_ops.model.assemble import assemble
from vila_ops.serve.app.routes import create_app
from vila_ops.serve.backends.local_process import free_port
from vila_ops.serve.spec import Spec

COUNT = 300
TARGET_MS = 3.0
TOKENIZER = Path(__file__).parents[1] / "tests/tiny/tokenizer"
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
        self._app = create_app(read, Instant(engine), replica={})  # type: ignore[arg-type]

    def __serve_build_asgi_app__(self) -> Any:
        return self._app


def main() -> None:
    """Measure and write the result."""
    with tempfile.TemporaryDirectory(prefix="vila") as folder:
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
        try:
            port = free_port("127.0.0.1", 0)
            serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
            serve.run(serve.deployment(serve.ingress()(Ours)).bind(spec(Path(folder)).model_dump_json()), name="ours")
            serve.run(Bare.bind(), name="bare", route_prefix="/bare")
            times = measured(f"http://127.0.0.1:{port}")
        finally:
            serve.shutdown()
            ray.shutdown()
    medians = {name: round(statistics.median(values) * 1000, 3) for name, values in times.items()}
    added = round(medians["ours"] - medians["bare"], 3)
    result(
        "serve_overhead", ours=medians["ours"], peer=medians["bare"], target=TARGET_MS, ok=added <= TARGET_MS,
        unit="ms at the median", added_ms=added, requests=COUNT,
    )  # fmt: skip


def spec(root: Path) -> Spec:
    """A random model, served with all defaults."""
    model = Model.model_validate(
        {
            "vision_tower": {"kind": "random", "architecture": "clip"},
            "projector": {"kind": "mlp_gelu"},
            "language_model": {"kind": "random", "tokenizer": str(TOKENIZER)},
            "image_size": 56,
            "patch_size": 14,
        }
    )
    storage = {name: str(root / name) for name in ("store", "data", "cache")}
    resources = Resources.model_validate({"launch": "inline", "device": "cpu", "storage": storage})
    made = assemble(model, resources)
    checkpoint = Checkpoint(uri=made.uri, digest=made.digest, parents=made.parents, stage="sft", step=0)
    version = ModelVersion(name="tiny", version=1, checkpoint=checkpoint, promoted=True)
    return Spec.of(Service(name="bench"), version, resources)


def measured(url: str) -> dict[str, list[float]]:
    """Seconds of each request, after some that warm up."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Say hello to all of us."}], "max_tokens": 4}
    paths = {"ours": "/v1/chat/completions", "bare": "/bare/chat"}
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
