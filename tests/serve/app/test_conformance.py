"""The official client gets chats, second turns, streams and errors; what it asks for reaches the engine."""

import json
import socket
from collections.abc import Iterator
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import openai
import pytest
from pydantic import BaseModel, Field

from tests.serve.app.live import HELLO, MODEL, ScriptedEngine, client_of, endpoint, http, image_part, png, wait_until
from vila_ops.artifacts.kinds import ModelVersion
from vila_ops.generate.engine import Engine
from vila_ops.generate.request import Delta, TokenLogprob
from vila_ops.generate.torch_engine.engine import InProcessEngine

TEXT = "Gr\u00fc\u00dfe \U0001f642 und mehr"


@pytest.fixture
def url(versions: tuple[ModelVersion, ModelVersion], scripted: ScriptedEngine) -> Iterator[str]:
    """An endpoint whose answers are scripted: the text, one token at a time."""
    scripted.script = [*(Delta([token]) for token in scripted.tokenizer.text_ids(TEXT)), Delta([], "stop")]
    with endpoint(versions[0], scripted) as url:
        yield url


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    """The official client."""
    return client_of(url)


def ask(client: openai.OpenAI, **request: Any) -> Any:
    """The answer to a request."""
    return client.chat.completions.create(**{"model": MODEL, "messages": HELLO, **request})


def test_a_real_model_streams_the_answer_that_it_gives_whole(
    versions: tuple[ModelVersion, ModelVersion], real_engine: Engine
) -> None:
    messages = [{"role": "user", "content": [image_part(png(20, 10)), {"type": "text", "text": "What?"}]}]
    with endpoint(versions[0], real_engine) as url, client_of(url) as client:
        whole = ask(client, messages=messages, max_tokens=12)
        options = {"include_usage": True}
        chunks = list(ask(client, messages=messages, max_tokens=12, stream=True, stream_options=options))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == whole.choices[0].finish_reason
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    assert whole.usage.prompt_tokens_details.image_tokens == real_engine.tokenizer.image_tokens
    assert {chunk.system_fingerprint for chunk in chunks} == {versions[0].checkpoint.digest}


class Person(BaseModel):
    """What an answer is read as."""

    name: Literal["Ann", "Bo"]
    ages: Annotated[list[Annotated[int, Field(ge=0, le=9)]], Field(min_length=1, max_length=2)]


def test_answers_are_json_where_a_client_asks_for_it(
    versions: tuple[ModelVersion, ModelVersion], real_engine: Engine
) -> None:
    """The official client sends the schema of the class and reads the answer by it."""
    own = InProcessEngine(real_engine.loaded, max_batch=4)  # type: ignore[attr-defined]  # an endpoint closes its engine
    with endpoint(versions[0], own) as url, client_of(url) as client:
        for seed in range(4):
            parsed = client.chat.completions.parse(
                model=MODEL,
                messages=HELLO,
                response_format=Person,
                temperature=1,
                seed=seed,  # type: ignore[arg-type]
            )
            assert isinstance(parsed.choices[0].message.parsed, Person)
        text = ask(client, response_format={"type": "json_object"}, max_tokens=4).choices[0].message.content
    assert text.startswith("{")


def test_a_second_turn_with_the_clients_own_message_is_answered(
    client: openai.OpenAI, scripted: ScriptedEngine
) -> None:
    first = ask(client).choices[0].message
    ask(client, messages=[*HELLO, first, {"role": "user", "content": "And now?"}])
    turns = [("user", ("Hello",)), ("assistant", (TEXT,)), ("user", ("And now?",))]
    assert scripted.asked[-1][0].input_ids == scripted.tokenizer.prompt(turns)


def test_a_developer_turn_is_the_system_turn(client: openai.OpenAI, scripted: ScriptedEngine) -> None:
    ask(client, messages=[{"role": "developer", "content": "Be brief."}, *HELLO])
    expected = scripted.tokenizer.prompt([("system", ("Be brief.",)), ("user", ("Hello",))])
    assert scripted.asked[-1][0].input_ids == expected


def test_sampling_settings_reach_the_engine(client: openai.OpenAI, scripted: ScriptedEngine) -> None:
    ask(
        client, n=2, max_completion_tokens=7, temperature=0.5, top_p=0.9, presence_penalty=-1, frequency_penalty=2,
        seed=-3, logprobs=True, top_logprobs=4, logit_bias={"5": -100},
        extra_body={"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.5},
    )  # fmt: skip
    settings = [sampling for _, sampling in scripted.asked]
    assert [one.choice for one in settings] == [0, 1]
    for one in settings:
        assert (one.max_new_tokens, one.temperature, one.top_p, one.top_k, one.min_p) == (7, 0.5, 0.9, 3, 0.1)
        assert (one.presence_penalty, one.frequency_penalty, one.repetition_penalty) == (-1, 2, 1.5)
        assert (one.seed, one.logprobs, dict(one.logit_bias)) == (-3, 4, {5: -100})
    ask(client, extra_body={"top_k": -1})
    assert (scripted.asked[-1][1].top_k, scripted.asked[-1][1].temperature) == (0, 0)
    assert scripted.asked[-1][1].logprobs is None


def test_choices_and_their_tokens_are_counted(client: openai.OpenAI, scripted: ScriptedEngine) -> None:
    answer = ask(client, n=3)
    assert [(one.index, one.message.content, one.finish_reason) for one in answer.choices] == [
        (index, TEXT, "stop") for index in range(3)
    ]
    assert answer.usage.completion_tokens == 3 * len(scripted.tokenizer.text_ids(TEXT))


def test_a_stop_string_ends_the_answer_in_the_engine_too(client: openai.OpenAI, scripted: ScriptedEngine) -> None:
    scripted.script.insert(-1, 1e6)
    for stream in (False, True):
        answer = ask(client, stop=["nd m", "\U0001f642 u"], stream=stream)
        if stream:
            chunks = list(answer)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert (text, reason) == (TEXT.partition("\U0001f642 u")[0], "stop")
    wait_until(lambda: scripted.running == 0)


def test_logprobs_name_the_tokens_of_the_text(client: openai.OpenAI, scripted: ScriptedEngine) -> None:
    ids = scripted.tokenizer.text_ids(TEXT)
    deltas = [Delta([token], None, (TokenLogprob(token, -0.25, ((token, -0.25),)),)) for token in ids]
    scripted.script = [*deltas, Delta([], "length")]
    content = ask(client, logprobs=True, top_logprobs=1).choices[0].logprobs.content
    assert b"".join(bytes(one.bytes) for one in content).decode() == TEXT
    assert {one.logprob for one in content} == {-0.25}
    streamed = [chunk.choices[0].logprobs for chunk in ask(client, logprobs=True, top_logprobs=1, stream=True)]
    assert [one for part in streamed if part for one in part.content] == content


def test_a_failure_in_a_stream_is_a_neutral_error_event(
    client: openai.OpenAI, url: str, scripted: ScriptedEngine
) -> None:
    scripted.script = [Delta(scripted.tokenizer.text_ids("word ")), RuntimeError("/secret/path")]
    received = []
    with pytest.raises(openai.APIError, match="its log"):
        received.extend(ask(client, stream=True))
    raw = http().post(f"{url}/v1/chat/completions", json={"model": MODEL, "messages": HELLO, "stream": True})
    assert (raw.status_code, raw.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    *chunks, last, rest = raw.text.split("\n\n")
    assert rest == ""
    assert "secret" not in raw.text
    assert "[DONE]" not in raw.text
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "internal_error"
    assert all(json.loads(chunk.removeprefix("data: "))["object"] == "chat.completion.chunk" for chunk in chunks)


def test_a_whole_stream_ends_with_done(url: str) -> None:
    raw = http().post(f"{url}/v1/chat/completions", json={"model": MODEL, "messages": HELLO, "stream": True})
    assert raw.text.endswith("\n\ndata: [DONE]\n\n")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_answer(url: str, scripted: ScriptedEngine, stream: bool) -> None:
    scripted.script.insert(1, 1e6)
    body = json.dumps({"model": MODEL, "messages": HELLO, "stream": stream, "n": 2}).encode()
    address = urlsplit(url)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection((str(address.hostname), int(address.port or 0)), timeout=30) as connection:
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        wait_until(lambda: scripted.running == 2)
    wait_until(lambda: scripted.running == 0)


def test_neutral_values_of_what_is_not_supported_pass(client: openai.OpenAI) -> None:
    answer = ask(
        client, tools=[], tool_choice="none", parallel_tool_calls=True, modalities=["text"], stream_options=None,
        logit_bias={}, response_format={"type": "text"}, service_tier="auto", store=False, user="someone", n=1,
    )  # fmt: skip
    assert answer.choices[0].message.content == TEXT


def test_a_body_may_have_a_byte_order_mark_and_an_image_no_detail(url: str) -> None:
    image = image_part(png(4, 4))
    image["image_url"]["detail"] = None
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": [image]}]}).encode("utf-8-sig")
    raw = http().post(f"{url}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert raw.json()["choices"][0]["message"]["content"] == TEXT


def test_the_models_of_an_endpoint(client: openai.OpenAI) -> None:
    assert client.models.retrieve(MODEL).id == client.models.list().data[0].id == MODEL
    with pytest.raises(openai.NotFoundError, match="'other'"):
        client.models.retrieve("other")


def test_the_responses_api_says_what_to_use(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="chat/completions"):
        client.responses.create(model=MODEL, input="Hello")


def test_state_and_metrics(client: openai.OpenAI, url: str, scripted: ScriptedEngine) -> None:
    tokens = len(scripted.tokenizer.text_ids(TEXT))
    ask(client, n=2)
    assert http().get(f"{url}/ready").json() == {"status": "ready"}
    assert http().get(f"{url}/version").json()["model"] == MODEL
    metrics = http().get(f"{url}/metrics").text
    labels = f'{{model_name="{MODEL}",model_version="1",replica="1"}}'
    assert f"vllm:generation_tokens_total{labels} {2 * tokens}.0" in metrics
    assert f"vllm:time_to_first_token_seconds_count{labels} 1.0" in metrics
    assert f"vila:answers_under_way{labels} 0.0" in metrics
    schema = http().get(f"{url}/openapi.json").json()
    assert "temperature" in schema["components"]["schemas"]["ChatRequest"]["properties"]


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/models", "/version", "/"])
def test_head_has_the_headers_of_get_and_no_body(url: str, path: str) -> None:
    """Monitors and load balancers ask so (public reports: vmware-archive/healthcheck#29, pocketbase#4310)."""
    head, get = http().head(url + path), http().get(url + path)
    assert (head.status_code, head.content) == (200, b"")
    for name in ("content-type", "content-length"):
        assert head.headers[name] == get.headers[name]


def test_a_request_has_an_id_of_the_clients_or_a_new_one(url: str) -> None:
    assert http().get(f"{url}/v1/models", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    made = http().get(f"{url}/v1/none", headers={"x-request-id": "a b\u00e9".encode()}).headers["x-request-id"]
    assert len(made) == 32
