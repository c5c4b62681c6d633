"""Allocated bytes of an endpoint over an hour of requests: the slope has to be none that a day would show.

A random model answers chats of all kinds as a Poisson process, at a share (VILA_BENCH_LOAD, 0.8) of the rate that it
reached in a closed loop at the start: texts and images of several lengths, whole and streamed, clients that leave and
images that cannot be read. Every image is a new one, so caches are full and change all the time; the words are few, as
the tokenizer caches the first 10,000. Every minute, when all answers have ended, the server collects garbage and says
what glibc's allocator has given out (`mallinfo2`), Python's objects included. Before the first reading every product of
matrices is compiled, every batch size is warmed up and every cache is full.

VILA_BENCH_MINUTES is the duration (60). Target: the upper end of the 95 % interval of the slope is at most 1 MB an
hour, and the 99th percentile of the times of whole answers in the last third is no more than 1.5 times that of the
first one.
"""

import asyncio
import base64
import ctypes
import gc
import io
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image as Pillow
from result import result
from scipy.stats import linregress, t
from serving import SMALL, Server, http, running, tiny_version

from vila_ops.config import Resources, Service
from vila_ops.generate.engine import EngineOptions
from vila_ops.generate.torch_engine.scheduler import SLOTS
from vila_ops.serve.backends.http_protocol import options
from vila_ops.serve.backends.local_process import free_port
from vila_ops.serve.spec import Spec

MINUTES = float(os.environ.get("VILA_BENCH_MINUTES", "2" if SMALL else "60"))
LOAD = float(os.environ.get("VILA_BENCH_LOAD", "0.8"))
TARGET_MB = 1.0
STEADY = 1.5
CYCLE = 64
"""Requests after which their kinds repeat: as many as prompts are kept, so that equal ones are kept at each reading."""
WARM_CYCLES = {8: 4, 4: 2, 2: 1, 1: 1}
"""Clients of a closed loop -> cycles. Their images are more than are kept."""
MALLINFO2 = (
    *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
    *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
)
READ_SECONDS = 60.0 if MINUTES >= 10 else 10.0


class Mallinfo2(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [(name, ctypes.c_size_t) for name in MALLINFO2]


def serve(spec: str, host: str, port: str) -> None:
    """The endpoint, with a route that says how many bytes are allocated."""
    import uvicorn

    from vila_ops.serve.app.load import load_app

    read = Spec.model_validate_json(spec)
    app, libc = load_app(read, read.device, replica={}), ctypes.CDLL("libc.so.6")
    libc.mallinfo2.restype = Mallinfo2
    compile_products()

    @app.get("/allocated")
    async def allocated() -> dict[str, int]:
        gc.collect()
        info = libc.mallinfo2()
        return {"bytes": info.uordblks + info.hblkhd}

    uvicorn.run(app, host=host, port=int(port), log_level="warning", **options())


def compile_products() -> None:
    """Each product that a pass may need, once: oneDNN keeps one for each number of rows that is multiplied."""
    import torch

    from vila_ops.generate.torch_engine.packed import PackedLinear, padded

    numbers = {padded(rows) for rows in range(1, EngineOptions.prefill_tokens + SLOTS)}
    layers = {(one.in_features, one.out_features): one for one in gc.get_objects() if isinstance(one, PackedLinear)}
    if not layers:
        raise RuntimeError("no layer of the model is packed")
    with torch.inference_mode():
        for (width, _), layer in layers.items():
            for rows in sorted(numbers):
                layer(torch.zeros(rows, width))


@contextmanager
def server(root: Path) -> Iterator[Server]:
    """The process of `serve`. Python's objects come from malloc too, so that `mallinfo2` counts them."""
    version = tiny_version(root)
    resources = Resources.model_validate({"launch": "inline", "device": "cpu", "serve": {"cpus_per_replica": 1}})
    spec, port = Spec.of(Service(name="soak"), version, resources), free_port("127.0.0.1", 0)
    command = [sys.executable, __file__, spec.model_dump_json(), "127.0.0.1", str(port)]
    env = {"PYTHONMALLOC": "malloc", "MALLOC_ARENA_MAX": "2"}
    with running(command, port, root / "soak.log", env=env) as url:
        yield Server(url, version.name)


@dataclass
class Seen:
    """What the clients saw."""

    seconds: list[float] = field(default_factory=list)
    """Of answers that came whole."""
    failed: list[str] = field(default_factory=list)
    requests: int = 0


def request(number: int, model: str) -> dict[str, Any]:
    """The body of a request. Its kind repeats after CYCLE requests; its image does not."""
    kind = number % CYCLE
    draw = np.random.default_rng(number)
    text = f"{number // CYCLE % 10} " + "Say what you see. " * (1 + kind % 7)
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    for _ in range(kind % 3):
        out = io.BytesIO()
        Pillow.fromarray(draw.integers(0, 256, (40, 60, 3), np.uint8)).save(out, "PNG")
        data = out.getvalue() if kind % 16 != 1 else out.getvalue()[:100]
        parts.append({"type": "image_url", "image_url": {"url": f"data:;base64,{base64.b64encode(data).decode()}"}})
    body = {"model": model, "messages": [{"role": "user", "content": parts}], "stream": kind % 2 == 0}
    return body | {"max_tokens": 4 + kind % 12, "temperature": kind % 4 / 2, "seed": number}


async def ask(client: httpx.AsyncClient, url: str, body: dict[str, Any], *, number: int, seen: Seen) -> None:
    """One request; a kind of them leaves after the first event, and a kind has an image that cannot be read."""
    kind, started = number % CYCLE, time.perf_counter()
    seen.requests += 1
    async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        if kind % 16 == 8 and response.status_code == httpx.codes.OK:
            async for _ in response.aiter_lines():
                return
        text = (await response.aread()).decode()
    expected = httpx.codes.BAD_REQUEST if kind % 16 == 1 and kind % 3 else httpx.codes.OK
    if response.status_code != expected or (body["stream"] and response.status_code == 200 and "[DONE]" not in text):
        seen.failed.append(f"{number}: {response.status_code} {text[-300:]}")
    elif expected == httpx.codes.OK:
        seen.seconds.append(time.perf_counter() - started)


class Soak:
    """Requests to one server, numbered as they come."""

    def __init__(self, to: Server, client: httpx.AsyncClient) -> None:
        self._server, self._client, self._number = to, client, 0
        self._draw = np.random.default_rng(0)

    async def closed_loop(self, *, clients: int, cycles: int) -> float:
        """Requests a second of so many clients that ask one after the other."""
        seen, left, started = Seen(), iter(range(cycles * CYCLE)), time.perf_counter()

        async def one_client() -> None:
            for _ in left:
                await self._ask(seen)

        await asyncio.gather(*(one_client() for _ in range(clients)))
        if seen.failed:
            raise RuntimeError(f"requests failed: {seen.failed[:3]}")
        return seen.requests / (time.perf_counter() - started)

    async def arrivals(self, *, rate: float, seconds: float) -> Seen:
        """Whole cycles of requests that arrive as a Poisson process, for so long at least; all have ended then."""
        seen, started = Seen(), time.perf_counter()
        async with asyncio.TaskGroup() as group:
            while time.perf_counter() - started < seconds:
                for _ in range(CYCLE):
                    await asyncio.sleep(self._draw.exponential(1 / rate))
                    group.create_task(self._ask(seen))
        return seen

    async def allocated_mb(self) -> float:
        """What the server has allocated, in MB."""
        await asyncio.sleep(1)
        response = await self._client.get(f"{self._server.url}/allocated")
        return float(response.raise_for_status().json()["bytes"]) / 1e6

    async def _ask(self, seen: Seen) -> None:
        number, self._number = self._number, self._number + 1
        body = request(number, self._server.model)
        try:
            await ask(self._client, self._server.url, body, number=number, seen=seen)
        except httpx.TransportError as error:
            seen.failed.append(f"{number}: {error!r}")


async def measured(to: Server) -> dict[str, Any]:
    """Warm up, measure the capacity, then the soak."""
    async with http() as client:
        soak = Soak(to, client)
        for clients, cycles in WARM_CYCLES.items():
            await soak.closed_loop(clients=clients, cycles=cycles)
        capacity = await soak.closed_loop(clients=8, cycles=2)
        await soak.arrivals(rate=LOAD * capacity, seconds=READ_SECONDS)
        started, hours, megabytes, seen = time.perf_counter(), [], [], []
        while (elapsed := time.perf_counter() - started) < MINUTES * 60:
            seen.append(await soak.arrivals(rate=LOAD * capacity, seconds=READ_SECONDS))
            megabytes.append(round(await soak.allocated_mb(), 3))
            hours.append((time.perf_counter() - started) / 3600)
            print(f"{elapsed / 60:.0f} min: {megabytes[-1]} MB, {seen[-1].requests} requests", flush=True)
    return {"capacity": capacity, "hours": hours, "megabytes": megabytes, "seen": seen}


def main() -> bool:
    """Measure and write the result."""
    with tempfile.TemporaryDirectory(prefix="vila") as folder, server(Path(folder)) as to:
        run = asyncio.run(measured(to))
    seen: list[Seen] = run["seen"]
    line = linregress(run["hours"], run["megabytes"])
    upper = line.slope + t.ppf(0.975, len(seen) - 2) * line.stderr
    third = max(1, len(seen) // 3)
    p99 = [
        round(float(np.percentile([one for minute in part for one in minute.seconds], 99)), 3)
        for part in (seen[:third], seen[-third:])
    ]
    failed = [one for minute in seen for one in minute.failed]
    ok = bool(upper <= TARGET_MB) and p99[1] <= STEADY * p99[0] and not failed
    result(
        "soak", ours=upper, peer=TARGET_MB, target=1.0, ok=ok, unit="MB an hour, upper end of the 95 % interval",
        slope=round(line.slope, 3), minutes=MINUTES, load=LOAD, capacity=round(run["capacity"], 2),
        requests=sum(minute.requests for minute in seen), failed=failed[:5], p99_first_third=p99[0],
        p99_last_third=p99[1], allocated_mb=run["megabytes"],
    )  # fmt: skip
    return ok


if __name__ == "__main__":
    if len(sys.argv) > 1:
        serve(*sys.argv[1:])
    else:
        sys.exit(not main())
