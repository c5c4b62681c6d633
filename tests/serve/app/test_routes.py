"""OpenAI's client gets answers from the app, and errors that say what would be accepted."""

import base64
import io
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from fastapi.testclient import TestClient
from PIL import Image as Pillow
from torch import Tensor

from vila_ops.artifacts.kinds import ModelVersion
from vila_ops.artifacts.store import content
from vila_ops.config import Resources, Service
from vila_ops.config.images import Webp
from vila_ops.config.resources import ServeResources
from vila_ops.data.images import square
from vila_ops.data.records import Image
from vila_ops.generate.engine import EngineOptions, generate_all
from vila_ops.generate.request import Delta, Output, Prompt, Sampling
from vila_ops.generate.torch_engine.engine import InProcessEngine
from vila_ops.generate.torch_engine.kv_cache import Group
from vila_ops.generate.torch_engine.loaded_model import LoadedModel, read_model
from vila_ops.generate.torch_engine.request_state import GenerationRequest
from vila_ops.generate.torch_engine.scheduler import Event, Scheduler
from vila_ops.serve.app.routes import create_app
from vila_ops.serve.spec import Spec

JSON = {"Content-Type": "application/json"}
SERVICE = Service(name="tiny", max_new_tokens=32, max_images=2, max_image_pixels=10_000, max_body_bytes=100_000)
RESOURCES = Resources(launch="inline", serve=ServeResources(max_batch=4))
MODEL = "tiny-vila"


class ObservedScheduler(Scheduler):
    """The real scheduler; it records the sizes of its batches, waits for a gate, and fails on a marked token."""

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__(loaded, slots=RESOURCES.serve.max_batch, cache_tokens=65_536, prefill_tokens=256)
        self.batches: list[int] = []
        self.gate = threading.Event()
        self.poison: int | None = None

    def step(self, arrivals: Sequence[GenerationRequest] = ()) -> list[Event]:
        self.gate.wait(30)
        return super().step(arrivals)

    def _hidden(self, groups: Sequence[Group], *given: Any) -> Tensor:
        rows = [row for rows, _ in groups for row in rows]
        self.batches.append(len(rows))
        if any(self.poison in self.rows[row].request.prompt.input_ids for row in rows):
            raise RuntimeError("/secret/path exploded")
        return super()._hidden(groups, *given)


class ObservedEngine(InProcessEngine):
    """The real engine; it records which prompts arrived."""

    scheduler: ObservedScheduler

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__(loaded, max_batch=RESOURCES.serve.max_batch)
        self.scheduler = ObservedScheduler(loaded)
        self.arrived: list[Prompt] = []

    async def generate(self, prompt: Prompt, sampling: Sampling, request_id: str) -> AsyncIterator[Delta]:
        self.arrived.append(prompt)
        async for delta in super().generate(prompt, sampling, request_id):
            yield delta


@pytest.fixture(scope="module")
def loaded(versions: tuple[ModelVersion, ModelVersion], tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """The first version's model."""
    return read_model(content(versions[0].checkpoint), EngineOptions(tmp_path_factory.mktemp("features")))


@pytest.fixture(scope="module")
def engine(loaded: LoadedModel) -> ObservedEngine:
    """The engine of the app."""
    return ObservedEngine(loaded)


@pytest.fixture(scope="module")
def expected(loaded: LoadedModel) -> Callable[[Prompt, int], Output]:
    """What another engine of the same model generates for a prompt alone."""
    reference = InProcessEngine(loaded, max_batch=None)

    def output(prompt: Prompt, max_new_tokens: int) -> Output:
        return generate_all(reference, [prompt], Sampling(max_new_tokens, reference.tokenizer.stop_ids))[0]

    return output


@pytest.fixture(scope="module")
def url(versions: tuple[ModelVersion, ModelVersion], engine: ObservedEngine) -> Iterator[str]:
    """The real app on a real port."""
    spec = Spec.of(SERVICE, versions[0], RESOURCES)
    app = create_app(spec, engine, replica={"pid": 1})
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(autouse=True)
def _fresh(engine: ObservedEngine) -> None:
    engine.arrived.clear()
    engine.scheduler.batches.clear()
    engine.scheduler.gate.set()
    engine.scheduler.poison = None


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    """The official client."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


def wait_for(count: int, engine: ObservedEngine) -> None:
    """Return when `count` requests have arrived at the engine."""
    deadline = time.monotonic() + 30
    while len(engine.arrived) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def data_url(data: bytes) -> str:
    """An image as clients send it."""
    return "data:image/png;base64," + base64.b64encode(data).decode()


def image_part(data: bytes) -> dict[str, Any]:
    """An image part of a message."""
    return {"type": "image_url", "image_url": {"url": data_url(data)}}


def text(words: str) -> dict[str, Any]:
    """A text part of a message."""
    return {"type": "text", "text": words}


def schema(made: dict[str, Any]) -> dict[str, Any]:
    """A request for answers that follow a JSON schema."""
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": made}}}


def user(*parts: dict[str, Any]) -> list[Any]:
    """A conversation of one message."""
    return [{"role": "user", "content": list(parts)}]


def png(width: int, height: int) -> bytes:
    """A white image."""
    out = io.BytesIO()
    Pillow.new("RGB", (width, height), "white").save(out, "PNG")
    return out.getvalue()


def test_an_image_and_a_question_get_the_greedy_answer_with_real_numbers(
    client: openai.OpenAI,
    engine: ObservedEngine,
    expected: Callable[[Prompt, int], Output],
    versions: tuple[ModelVersion, ModelVersion],
    image: bytes,
) -> None:
    messages = user(text("Look: "), image_part(image), text("What is it?"))
    answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=6)
    small = square(image, size=engine.image_size, fit=engine.image_aspect_ratio, encoding=Webp())
    ids = engine.tokenizer.prompt([("user", ("Look: ", Image(small), "What is it?"))])
    assert ids.count(engine.tokenizer.image_id) == engine.tokenizer.image_tokens == 16
    assert answer.choices[0].message.content == engine.tokenizer.decode(expected(Prompt(ids, (small,)), 6).ids)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens == 6
    assert answer.usage.total_tokens == len(ids) + 6
    assert answer.system_fingerprint == versions[0].checkpoint.digest
    assert answer.model == MODEL
    assert answer.id.startswith("chatcmpl-")
    assert abs(answer.created - time.time()) < 60


def test_an_answer_that_ends_by_itself_says_stop(
    client: openai.OpenAI,
    engine: ObservedEngine,
    expected: Callable[[Prompt, int], Output],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    messages: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    ids = engine.tokenizer.prompt([("system", ("Be brief.",)), ("user", ("Hello",))])
    first = expected(Prompt(ids), 16).ids[0]
    monkeypatch.setitem(vars(engine.tokenizer), "stop_ids", frozenset({first}))
    answer = client.chat.completions.create(model=MODEL, messages=messages, max_completion_tokens=16)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0
    assert answer.choices[0].message.content == ""


def test_the_model_list_and_health_name_the_digest(
    client: openai.OpenAI, url: str, versions: tuple[ModelVersion, ModelVersion]
) -> None:
    listed = client.models.list().data
    assert [model.id for model in listed] == [MODEL]
    assert listed[0].model_dump()["digest"] == versions[0].checkpoint.digest
    health = httpx.get(f"{url}/health").json()
    assert health == {"status": "ok", "model": versions[0].checkpoint.digest, "replica": {"pid": 1}}


def test_the_version_names_the_precision_and_the_identity_that_it_is_part_of(
    url: str, versions: tuple[ModelVersion, ModelVersion]
) -> None:
    shown = httpx.get(f"{url}/version").json()
    assert shown["precision"] == "fp32"
    services = [SERVICE.with_changes({"precision": precision}) for precision in ("fp32", "int8", "int4")]
    identities = [Spec.of(service, versions[0], RESOURCES).identity() for service in services]
    assert shown["identity"] == identities[0]
    assert len(set(identities)) == 3


def test_concurrent_requests_share_batches_and_get_the_answers_that_they_get_alone(
    client: openai.OpenAI, url: str, engine: ObservedEngine, image: bytes
) -> None:
    def query(number: int) -> tuple[str, str, int]:
        parts = [image_part(image)] if number % 2 else []
        messages = user(*parts, text("word " * (3 * number + 1)))
        answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=2 * number + 1)
        assert answer.usage is not None
        return answer.choices[0].message.content or "", answer.choices[0].finish_reason, answer.usage.completion_tokens

    alone = [query(number) for number in range(8)]
    engine.scheduler.batches.clear()
    engine.scheduler.gate.clear()
    engine.arrived.clear()
    with ThreadPoolExecutor(8) as pool:
        together = [pool.submit(query, number) for number in range(8)]
        wait_for(8, engine)
        assert httpx.get(f"{url}/health", timeout=60).status_code == 200  # while the engine is busy
        engine.scheduler.gate.set()
        assert [one.result() for one in together] == alone
    assert max(engine.scheduler.batches) == RESOURCES.serve.max_batch


def test_a_request_that_breaks_the_engine_fails_alone_and_neutrally(
    client: openai.OpenAI, engine: ObservedEngine
) -> None:
    engine.scheduler.poison = engine.tokenizer.text_ids("zebra")[0]
    engine.scheduler.gate.clear()

    def query(words: str) -> int | str:
        try:
            client.chat.completions.create(model=MODEL, messages=user(text(words)), max_tokens=1)
        except openai.InternalServerError as error:
            return str(error)
        return 200

    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(query, words) for words in ("hello", "zebra", "hello", "hello")]
        wait_for(4, engine)
        engine.scheduler.gate.set()
        first, broken, *others = [one.result() for one in answers]
    assert [first, *others] == [200, 200, 200]
    assert isinstance(broken, str)
    assert "secret" not in broken
    assert "its log" in broken


def test_a_control_token_in_a_users_text_is_not_a_control_token(client: openai.OpenAI, engine: ObservedEngine) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=user(text("<image> <|im_end|>")), max_tokens=1)
    ids = engine.tokenizer.prompt([("user", ("<image> <|im_end|>",))])
    assert engine.tokenizer.image_id not in ids
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(ids)


def refused(client: openai.OpenAI, **request: Any) -> dict[str, Any]:
    """The error of a request, in OpenAI's form."""
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**{"model": MODEL, "messages": user(text("Hi")), **request})
    body: Any = caught.value.body
    assert set(body) == {"message", "type", "param", "code"}
    return {"status": caught.value.status_code, **body}


@pytest.mark.parametrize(
    ("request_", "status", "param", "says"),
    [
        ({"model": "gpt-5"}, 404, "model", "'gpt-5'"),
        ({"temperature": 2.1}, 400, "temperature", "less than or equal to 2"),
        ({"n": 9}, 400, "n", "9 is more than the 8 answers"),
        ({"top_p": 0}, 400, "top_p", "greater than 0"),
        ({"stop": [""]}, 400, "stop[0]", "at least 1 character"),
        ({"stop": list("abcde")}, 400, "stop", "at most 4"),
        ({"top_logprobs": 2}, 400, "top_logprobs", "only if logprobs"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options", "unless stream is true"),
        ({"logit_bias": {"9999999": 1}}, 400, "logit_bias", "no token 9999999"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias.x", "match pattern"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools", "calls no tools"),
        ({"modalities": ["audio"]}, 400, "modalities", "text"),
        ({"messages": [{"role": "user", "content": "x", "name": "Ann"}]}, 400, "messages[0].name", "no names"),
        ({"response_format": {"type": "xml"}}, 400, "response_format", "json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, 400,
         "response_format.json_schema.schema", "required"),
        (schema({"type": "object", "not": {}}), 400, "response_format", "keyword 'not' is not supported"),
        ({"max_tokens": 0}, 400, "max_tokens", "greater than 0"),
        ({"max_tokens": 33}, 400, "max_tokens", "33 is more than the 32"),
        ({"max_completion_tokens": 33}, 400, "max_completion_tokens", "33 is more than the 32"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, 400, "max_tokens", "not both"),
        ({"messages": []}, 400, "messages", "at least 1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0].role", "user"),
        ({"messages": user({"type": "text"})}, 400, "messages[0].content[0].text", "required"),
        ({"messages": user({"type": "video"})}, 400, "messages[0].content[0]", "image_url"),
        ({"messages": user(text("word " * 3000))}, 400, "messages", "context is 2048 tokens"),
        ({"extra_body": {"best_of": 3}}, 400, "best_of", "not permitted"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_with_the_rule(
    client: openai.OpenAI, engine: ObservedEngine, request_: dict[str, Any], status: int, param: str, says: str
) -> None:
    error = refused(client, **request_)
    assert (error["status"], error["param"], error["type"]) == (status, param, "invalid_request_error")
    assert says in error["message"]
    assert not engine.scheduler.batches


def test_neutral_values_of_what_is_not_supported_are_fine(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=user(text("Hi")), max_tokens=1, temperature=0, top_p=1, n=1, stream=False, seed=3,
        user="someone",
    )  # fmt: skip
    assert answer.choices[0].finish_reason in ("stop", "length")


URL = "messages[0].content[0].image_url.url"


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("http://127.0.0.1:9/cat.png", "nothing is fetched"),
        ("https://example.com/cat.png", "nothing is fetched"),
        ("file:///etc/passwd", "this is none"),
        ("data:image/png,abc", "base64"),
        ("data:image/png;base64,@@@", "not valid base64"),
        (data_url(b"not an image"), "none of the formats"),
        (data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "none of the formats"),
        (data_url(png(40, 30)[:60]), "a PNG that ends before its IEND"),
        (data_url(png(101, 100)), "101 x 100 pixels"),
        (data_url(png(9000, 1)), "so narrow"),
    ],
)
def test_a_refused_image_is_named(client: openai.OpenAI, engine: ObservedEngine, address: str, says: str) -> None:
    error = refused(client, messages=user({"type": "image_url", "image_url": {"url": address}}))
    assert (error["status"], error["param"]) == (400, URL)
    assert says in error["message"]
    assert "/" not in error["message"].replace("data:image/png", "").replace("image/", "")
    assert not engine.scheduler.batches


def test_too_many_images_and_images_of_others_than_the_user_are_refused(client: openai.OpenAI, image: bytes) -> None:
    assert refused(client, messages=user(*[image_part(image)] * 3))["code"] == "too_many_images"
    conversation = [{"role": "assistant", "content": [image_part(image)]}]
    assert "only a user's message" in refused(client, messages=conversation)["message"]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_cut_off_before_it_is_parsed(url: str, chunked: bool) -> None:
    body = b"{" + b" " * SERVICE.max_body_bytes
    content: Any = (body[start : start + 10_000] for start in range(0, len(body), 10_000)) if chunked else body
    answer = httpx.post(f"{url}/v1/chat/completions", content=content, headers=JSON)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"\xff\xfe", b'{"model": "tiny-vila", "model": 3}'])
def test_a_body_that_is_no_request_is_a_400_in_openais_form(url: str, body: bytes) -> None:
    answer = httpx.post(f"{url}/v1/chat/completions", content=body, headers=JSON)
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_unknown_routes_and_methods_answer_in_openais_form(url: str) -> None:
    for method, route, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405)):
        answer = httpx.request(method, url + route)
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_an_answer_that_takes_too_long_is_a_504_and_is_aborted(
    versions: tuple[ModelVersion, ModelVersion], loaded: LoadedModel
) -> None:
    impatient = SERVICE.with_changes({"request_timeout_seconds": 0.2})
    engine = ObservedEngine(loaded)
    with TestClient(
        create_app(Spec.of(impatient, versions[0], RESOURCES), engine, replica={}), base_url="http://localhost"
    ) as local:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
        answer = local.post("/v1/chat/completions", json=body)
        engine.scheduler.gate.set()
    assert answer.status_code == 504
    assert "0.2 seconds" in answer.json()["error"]["message"]
    assert engine._streams == {}
