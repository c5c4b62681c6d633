"""Seconds of an evaluation: 1,000 short-answer items beside stock transformers, and requests to endpoints.

The model is the demo's, its projector untrained, in fp32: a question about an image of 224 pixels, an answer of 8
tokens at most. An image has ten questions, or one (an eighth of the items). Ours is what an evaluation does: shards of
requests, an `EngineTarget`, the tower's features in a fresh folder. The peer is `generate` of stock transformers with
the processor of the same folder: in batches of 16 sorted by length, on every fifth item, and one by one, on every
25th. Answers have to be equal on 99.9 % of the items of batches, and the others near-ties: where they part, the
two likeliest tokens are within NEAR_TIE nats.

An endpoint that sleeps is asked one request at a time and by an `EndpointTarget`. Our own is asked by one client, by 16
clients in threads, and by an `EndpointTarget`.

Targets: 3 times one by one, as fast as batches; 5 times one request at a time; 0.9 of the gain of 16 clients.
VILA_BENCH_ITEMS (1000) makes it smaller.
"""

import asyncio
import io
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
import torch
import uvicorn
from fastapi import FastAPI
from PIL import Image as Pillow
from result import result
from sklearn.datasets import load_sample_images
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vila_ops.artifacts.kinds import Checkpoint, Endpoint, ModelVersion, Pretrained
from vila_ops.artifacts.store import content
from vila_ops.config import Resources, Service, load
from vila_ops.config.engine import TorchEngine
from vila_ops.config.resources import EndpointResources
from vila_ops.data.shards import data_url
from vila_ops.eval.benchmark import GenerateRequest, SealedImage, TextPrompt
from vila_ops.eval.endpoint_target import EndpointTarget
from vila_ops.eval.engine_target import EngineTarget
from vila_ops.eval.prompts import request_hash
from vila_ops.eval.runner import answered
from vila_ops.eval.shards import shards_of
from vila_ops.generate.engine import EngineOptions
from vila_ops.generate.load import load_engine
from vila_ops.model.assemble import assemble
from vila_ops.serve.app.routes import create_app
from vila_ops.serve.spec import Spec

ROOT = Path(__file__).parents[1]
ITEMS = int(os.environ.get("VILA_BENCH_ITEMS", "1000"))
THREADS, BATCH, SIDE, CLIENTS = 2, 16, 224, 16
BATCHED, SINGLE = 5, 25
"""The peer is asked every so many items, in batches and one by one: its time an item depends on neither."""
REQUESTS = 8 * CLIENTS
"""Requests to our own endpoint; one client sends a quarter of them."""
NAP_SECONDS = 0.05
NEAR_TIE = 1e-3
HINT = "Answer the question using a single word or phrase."
SHORT = {"max_new_tokens": 8, "do_sample": False}
T = TypeVar("T")
WORDS = [
    "the",
    "red",
    "small",
    "old",
    "big",
    "round",
    "left",
    "right",
    "first",
    "next",
    "near",
    "under",
    "bird",
    "tree",
]


class Questions:
    """Requests with their images: crops of two photos."""

    def __init__(self, count: int, *, per_image: int) -> None:
        draw = np.random.default_rng(per_image)
        photos = [np.asarray(photo) for photo in load_sample_images().images]
        self.images: dict[str, bytes] = {}
        self.requests: list[GenerateRequest] = []
        self.texts: list[str] = []
        self.group_of: dict[str, str] = {}
        for number in range(count):
            key = f"image {number // per_image}"
            if key not in self.images:
                self.images[key] = _crop(photos[len(self.images) % 2], draw)
            words = " ".join(draw.choice(WORDS, int(draw.integers(3, 20))))
            self.texts.append(f"\nWhat is {words}?\n{HINT}")
            prompt, name = TextPrompt((("user", (SealedImage(key), self.texts[-1])),)), f"item {number}"
            self.requests.append(GenerateRequest(item=name, prompt=prompt, max_new_tokens=SHORT["max_new_tokens"]))
            self.group_of[name] = key

    def image_of(self, image: SealedImage) -> bytes:
        return self.images[image.key]

    def image(self, number: int) -> bytes:
        """The image of a request."""
        return self.images[self.group_of[f"item {number}"]]

    def messages(self, number: int) -> list[dict[str, Any]]:
        """A request as OpenAI's chat API reads it."""
        url = {"url": data_url(self.image(number))}
        parts = [{"type": "image_url", "image_url": url}, {"type": "text", "text": self.texts[number]}]
        return [{"role": "user", "content": parts}]


def _crop(photo: Any, draw: np.random.Generator) -> bytes:
    top, left = (int(draw.integers(0, side - SIDE)) for side in photo.shape[:2])
    file = io.BytesIO()
    Pillow.fromarray(photo[top : top + SIDE, left : left + SIDE]).save(file, "PNG")
    return file.getvalue()


class Peer:
    """Stock transformers on the same folder."""

    def __init__(self, folder: Path) -> None:
        self.model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(folder)

    def answers(self, questions: Questions, chosen: Sequence[int], *, batch: int) -> dict[int, list[int]]:
        """The token ids of the answers to the requests of these numbers."""
        texts = {number: self.text(questions.texts[number]) for number in chosen}
        order = sorted(chosen, key=lambda number: len(self.processor.tokenizer(texts[number]).input_ids))
        ids = {}
        for start in range(0, len(order), batch):
            own = order[start : start + batch]
            inputs = self.inputs(questions, own)
            with torch.inference_mode():
                given = self.model.generate(**inputs, **SHORT)[:, inputs["input_ids"].shape[1] :]
            ids |= dict(zip(own, given.tolist(), strict=True))
        ends = {*self.model.generation_config.eos_token_id, self.processor.tokenizer.pad_token_id}
        return {number: [one for one in answer if one not in ends] for number, answer in ids.items()}

    def margin(self, questions: Questions, number: int, ids: list[int], other: str) -> float:
        """Nats between the two likeliest tokens where an answer parts from another one."""
        decoded = [self.processor.decode(ids[: count + 1]).strip() for count in range(len(ids))]
        parts = next((place for place, text in enumerate(decoded) if not other.startswith(text)), len(ids))
        inputs = self.inputs(questions, [number])
        whole = torch.cat([inputs["input_ids"], torch.tensor([ids])], dim=1)
        with torch.inference_mode():
            logits = self.model(**{**inputs, "input_ids": whole, "attention_mask": torch.ones_like(whole)}).logits
        first, second = logits[0, parts - len(ids) - 1].log_softmax(-1).topk(2).values.tolist()
        return float(first - second)

    def inputs(self, questions: Questions, numbers: Sequence[int]) -> dict[str, Any]:
        """What the model reads of these requests, padded on the left."""
        images = [Pillow.open(io.BytesIO(questions.image(number))) for number in numbers]
        texts = [self.text(questions.texts[number]) for number in numbers]
        return dict(self.processor(images=images, text=texts, padding=True, return_tensors="pt"))

    def text(self, question: str) -> str:
        """A question as the folder's chat template writes it."""
        parts = [{"type": "image"}, {"type": "text", "text": question}]
        written: str = self.processor.apply_chat_template(
            [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
        )
        return written


def main() -> None:
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory(prefix="vila") as name:
        run = load(ROOT / "configs/recipes/demo.yaml", resources=ROOT / "configs/resources/inline.yaml")
        resources = run.resources.with_changes({"storage.store": f"{name}/store"})
        model = assemble(run.recipe.model, resources)
        peer = Peer(content(model))
        cases = {
            f"{size}_per_image": case(model, peer, items, size, Path(name) / f"features-{size}")
            for size, items in ((10, ITEMS), (1, ITEMS // 8))
        }
        del peer
        endpoints = {"sleeping": sleeping(), "own": own_endpoint(model, resources)}
    ten = cases["10_per_image"]
    ok = (
        min(ten["gain_over_one_by_one"] / 3, ten["gain_over_batches"]) >= 1
        and all(one["equal"] >= 0.999 and one["largest_margin"] < NEAR_TIE for one in cases.values())
        and endpoints["sleeping"]["gain"] >= 5
        and endpoints["own"]["gain"] >= 0.9 * endpoints["own"]["gain_of_clients"]
    )
    result(
        "eval_throughput", ours=ten["ours"], peer=ten["batches"], target=1.0, ok=ok,
        unit="items/s, ten questions an image; peer: batches of 16 sorted by length", cases=cases, endpoints=endpoints,
    )  # fmt: skip


def case(model: Pretrained, peer: Peer, items: int, per_image: int, features: Path) -> dict[str, float]:
    """Items a second of ours and of the peer, and how equal their answers are."""
    questions = Questions(items, per_image=per_image)
    options = EngineOptions(feature_root=features, threads=THREADS, keep_prefixes=True)
    target = EngineTarget(model, TorchEngine(), options)
    engine = target.engine
    warm = Questions(BATCH, per_image=1)
    answered(target, warm.requests, warm.image_of)
    answers, seconds = timed(lambda: ours(target, questions))
    some, few = range(0, items, BATCHED), range(0, items, SINGLE)
    peer.answers(warm, range(BATCH), batch=BATCH)
    batched, batch_seconds = timed(lambda: peer.answers(questions, some, batch=BATCH))
    _, single_seconds = timed(lambda: peer.answers(questions, few, batch=1))
    texts = {number: engine.tokenizer.decode(ids).strip() for number, ids in batched.items()}
    different = [number for number in some if texts[number] != answers[number]]
    margins = [peer.margin(questions, number, batched[number], answers[number]) for number in different]
    rate, batches, singles = items / seconds, len(some) / batch_seconds, len(few) / single_seconds
    measured = {"ours": rate, "batches": batches, "one_by_one": singles}
    gains = {"gain_over_batches": rate / batches, "gain_over_one_by_one": rate / singles}
    print(measured, gains, len(different), flush=True)
    return {
        **{key: round(value, 3) for key, value in (measured | gains).items()},
        "items": items,
        "compared": len(some),
        "equal": 1 - len(different) / len(some),
        "largest_margin": max(margins, default=0.0),
        "answer_tokens": round(float(np.mean([len(ids) for ids in batched.values()])), 2),
    }


def ours(target: EngineTarget, questions: Questions) -> list[str]:
    """The answers in the order of the requests."""
    by_item: dict[str, str] = {}
    for shard in shards_of(questions.requests, questions.group_of):
        given = answered(target, shard, questions.image_of)
        for request in shard:
            response = given[request_hash(request)]
            assert response.answer is not None, response
            by_item[request.item] = response.answer
    return [by_item[request.item] for request in questions.requests]


def sleeping() -> dict[str, float]:
    """Requests a second of an endpoint that sleeps NAP_SECONDS, and the gain over one at a time."""
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def answer() -> dict[str, Any]:
        await asyncio.sleep(NAP_SECONDS)
        return {"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}]}

    questions = Questions(min(ITEMS, 200), per_image=10)
    with served(app) as url:
        one, many = (
            by_target(url, "any", questions, concurrency=bound) for bound in (1, EndpointResources().max_concurrency)
        )
    return {"one": round(one, 2), "ours": round(many, 2), "gain": round(many / one, 3)}


def own_endpoint(model: Pretrained, resources: Resources) -> dict[str, float]:
    """Requests a second of our endpoint for one client, for CLIENTS clients, and for an `EndpointTarget`."""
    questions, some = Questions(REQUESTS, per_image=10), Questions(REQUESTS // 4, per_image=10)
    checkpoint = Checkpoint(uri=model.uri, digest=model.digest, stage="base", step=0)
    version = ModelVersion(name="demo", version=1, checkpoint=checkpoint, promoted=False)
    capacity = resources.with_changes({"serve.max_batch": CLIENTS})
    spec = Spec.of(Service(name="demo"), version, capacity)
    options = EngineOptions(threads=THREADS, max_batch=CLIENTS)
    engine = load_engine(model, TorchEngine(), options)
    with served(create_app(spec, engine, replica={"pid": 1})) as url:
        name = httpx.get(f"{url}/models").json()["data"][0]["id"]
        by_clients(url, name, questions, CLIENTS)  # every image goes through the tower
        one = by_clients(url, name, some, 1)
        many = by_clients(url, name, questions, CLIENTS)
        target = by_target(url, name, questions, concurrency=CLIENTS)
    engine.close()
    gains = {"gain": target / one, "gain_of_clients": many / one}
    measured = {"one": one, "clients": many, "ours": target} | gains
    return {key: round(value, 3) for key, value in measured.items()}


def by_target(url: str, name: str, questions: Questions, *, concurrency: int) -> float:
    """Requests a second of an `EndpointTarget`."""
    target = EndpointTarget(Endpoint(url=url, name=name), EndpointResources(max_concurrency=concurrency))
    responses, seconds = timed(lambda: target.answer(questions.requests, questions.image_of))
    assert all(response.answer is not None for response in responses), responses[0]
    return len(responses) / seconds


def by_clients(url: str, name: str, questions: Questions, clients: int) -> float:
    """Requests a second of so many plain clients in threads, each with one request under way."""
    how = {"model": name, "max_tokens": SHORT["max_new_tokens"], "temperature": 0}
    bodies = [{**how, "messages": questions.messages(number)} for number in range(len(questions.requests))]

    with httpx.Client(base_url=url, timeout=120) as client, ThreadPoolExecutor(clients) as pool:

        def post(body: dict[str, Any]) -> httpx.Response:
            return client.post("/chat/completions", json=body)

        given, seconds = timed(lambda: list(pool.map(post, bodies)))
    assert all(response.status_code == httpx.codes.OK for response in given), given[0].text
    return len(given) / seconds


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The URL of an app on a free port."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join()


def timed(work: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    value = work()
    return value, time.perf_counter() - start


if __name__ == "__main__":
    main()
