"""The demo's model behind our endpoint and behind `transformers serve`, and clients of both; for the other benchmarks.

Both servers read the same folder, compute in fp32 with one thread, and get the same requests. `transformers serve`
batches continuously only models without images, so this model answers one request at a time there.
"""

import asyncio
import base64
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image as Pillow
from sklearn.datasets import load_sample_images

from vila_ops.artifacts.kinds import Checkpoint, ModelVersion
from vila_ops.artifacts.store import content
from vila_ops.config import Model, Resources, Service, load
from vila_ops.model.assemble import assemble
from vila_ops.serve.backends.local_process import free_port
from vila_ops.serve.spec import Spec

ROOT = Path(__file__).parents[1]
SMALL = bool(os.environ.get("VILA_BENCH_SMALL"))
NEW_TOKENS = 32
START_SECONDS = 300.0
ENGINES: dict[str, dict[str, Any]] = {
    "torch": {"kind": "torch"},
    "vllm": {"kind": "vllm", "cache_bytes": 2**30, "compiled": False},
}
QUESTION = "Describe this image in a few sentences for somebody who cannot see it."


@dataclass
class Server:
    """Where a server listens, and the name of its model."""

    url: str
    model: str


@dataclass
class Answered:
    """One streamed answer: its text, and when its parts came, in seconds."""

    text: str = ""
    asked: float = 0.0
    parts: list[float] = field(default_factory=list)
    """A part is what one event brings: a token, unless it ends inside a character. An empty answer has one."""

    @property
    def first(self) -> float:
        """Seconds to the first part."""
        return self.parts[0] - self.asked

    @property
    def whole(self) -> float:
        """Seconds to the last part."""
        return self.parts[-1] - self.asked

    def between(self) -> list[float]:
        """Seconds between parts."""
        return [float(one) for one in np.diff(self.parts)]


def demo_version(root: Path, *, image_size: int = 56, **model: Any) -> ModelVersion:
    """The demo's model before training, with pretrained parts, but for the settings `model`.

    An image of 14 n pixels is n x n tokens.
    """
    run = load(ROOT / "configs/recipes/demo.yaml", resources=ROOT / "configs/resources/inline.yaml")
    resources = run.resources.with_changes({"storage.store": str(root / "store")})
    made = assemble(run.recipe.model.with_changes({"image_size": image_size, **model}), resources)
    checkpoint = Checkpoint(uri=made.uri, digest=made.digest, parents=made.parents, stage="sft", step=0)
    return ModelVersion(name="demo", version=1, checkpoint=checkpoint, promoted=True)


def tiny_version(root: Path) -> ModelVersion:
    """A random model that computes nearly nothing."""
    model = Model.model_validate(
        {
            "vision_tower": {"kind": "random", "architecture": "clip"},
            "projector": {"kind": "mlp_gelu"},
            "language_model": {"kind": "random", "tokenizer": str(ROOT / "tests/tiny/tokenizer")},
            "image_size": 56,
            "patch_size": 14,
        }
    )
    storage = {name: str(root / name) for name in ("store", "data", "cache")}
    resources = Resources.model_validate({"launch": "inline", "device": "cpu", "storage": storage})
    made = assemble(model, resources)
    checkpoint = Checkpoint(uri=made.uri, digest=made.digest, parents=made.parents, stage="sft", step=0)
    return ModelVersion(name="tiny", version=1, checkpoint=checkpoint, promoted=True)


@contextmanager
def our_server(version: ModelVersion, root: Path, *, engine: str = "torch") -> Iterator[Server]:
    """Our inline server, with one thread."""
    serve = {"max_batch": 16, "cpus_per_replica": 1, "engine": ENGINES[engine]}
    resources = Resources.model_validate({"launch": "inline", "device": "cpu", "serve": serve})
    spec, port = Spec.of(Service(name="bench"), version, resources), free_port("127.0.0.1", 0)
    module = "vila_ops.serve.backends.local_server"
    command = [sys.executable, "-m", module, spec.model_dump_json(), "127.0.0.1", str(port)]
    with running(command, port, root / f"{engine}.log") as url:
        yield Server(url, version.name)


@contextmanager
def transformers_server(version: ModelVersion, root: Path) -> Iterator[Server]:
    """`transformers serve` of the installed version, with one thread."""
    folder, port = str(content(version.checkpoint)), free_port("127.0.0.1", 0)
    command = [str(Path(sys.executable).parent / "transformers"), "serve", folder, "--device", "cpu"]
    command += ["--dtype", "float32", "--port", str(port)]
    with running(command, port, root / "transformers.log") as url:
        yield Server(url, folder)


@contextmanager
def running(command: list[str], port: int, log: Path, *, env: dict[str, str] | None = None) -> Iterator[str]:
    """The URL of a server, which is ended afterwards."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", **(env or {})}
    with log.open("w") as out:
        process = subprocess.Popen(command, env=variables, stdout=out, stderr=out)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(url, process, log)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def _wait(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/health", trust_env=False).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise RuntimeError(f"a server did not start:\n{log.read_text()[-2000:]}")


def photos(count: int, *, side: int = 112, seed: int = 0) -> list[str]:
    """Data URLs of different parts of two photos, PNG."""
    draw, made = np.random.default_rng(seed), []
    sources = [np.asarray(photo) for photo in load_sample_images().images]
    for number in range(count):
        source = sources[number % 2]
        top, left = (int(draw.integers(0, length - side)) for length in source.shape[:2])
        out = io.BytesIO()
        Pillow.fromarray(source[top : top + side, left : left + side]).save(out, "PNG")
        made.append("data:image/png;base64," + base64.b64encode(out.getvalue()).decode())
    return made


def chat(image: str, question: str = QUESTION, *, max_tokens: int = NEW_TOKENS) -> dict[str, Any]:
    """A request with one image, decoded greedily."""
    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": max_tokens, "temperature": 0}


async def answer(client: httpx.AsyncClient, server: Server, request: dict[str, Any]) -> Answered:
    """Stream one answer. Raises httpx.HTTPStatusError, and RuntimeError for an error in the stream."""
    body, seen = request | {"model": server.model, "stream": True}, Answered(asked=time.perf_counter())
    async with client.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"])
            for choice in event["choices"]:
                text = choice["delta"].get("content") or ""
                if text or (choice.get("finish_reason") and not seen.parts):
                    seen.text += text
                    seen.parts.append(time.perf_counter())
    return seen


def http() -> httpx.AsyncClient:
    """A client without a limit of connections or time. It keeps idle connections for less time than servers do."""
    limits = httpx.Limits(max_connections=None, keepalive_expiry=2)
    return httpx.AsyncClient(timeout=600, limits=limits, trust_env=False)


def closed_loop(server: Server, requests: Sequence[dict[str, Any]], *, clients: int) -> tuple[float, list[Answered]]:
    """Seconds in which so many clients, each with one request at a time, get all answers; the answers in order."""

    async def run() -> list[Answered]:
        answers, left = [Answered() for _ in requests], iter(enumerate(requests))

        async def one_client() -> None:
            for number, request in left:
                answers[number] = await answer(client, server, request)

        async with http() as client:
            await asyncio.gather(*(one_client() for _ in range(clients)))
        return answers

    started = time.perf_counter()
    answers = asyncio.run(run())
    return time.perf_counter() - started, answers


def open_loop(server: Server, requests: Sequence[dict[str, Any]], *, rate: float, seed: int) -> list[Answered]:
    """The answers to requests that arrive as a Poisson process, so many a second, whether others have ended or not."""
    waits = np.random.default_rng(seed).exponential(1 / rate, len(requests)).cumsum()

    async def run() -> list[Answered]:
        async def arriving(client: httpx.AsyncClient, wait: float, request: dict[str, Any]) -> Answered:
            await asyncio.sleep(wait)
            return await answer(client, server, request)

        async with http() as client:
            return await asyncio.gather(
                *(arriving(client, wait, request) for wait, request in zip(waits, requests, strict=True))
            )

    return asyncio.run(run())
