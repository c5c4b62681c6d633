"""The router passes on what it gets, draws conversations for a canary, takes a bad one back, and loses nothing."""

import asyncio
import json
import socket
import threading
import time
from collections import Counter
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import Scope, Send

from tests.serve.app.live import http, wait_until
from tests.serve.router.conftest import Setting, answer, completion, plain
from vila_ops.serve.app.metrics import Metrics
from vila_ops.serve.router.state import Track

ANN = {"Authorization": "Bearer ann"}
both = pytest.mark.parametrize("setting", ["http", "proxy"], indirect=True)
"""For a router that reaches replicas by HTTP, and for one within Ray Serve's proxy."""


def ask(setting: Setting, question: str, *, turns: int = 1, **body: Any) -> httpx.Response:
    """The response to a question, or to a later one of its conversation."""
    more = [{"role": role, "content": f"turn {turn}"} for turn in range(1, turns) for role in ("assistant", "user")]
    chat = {"model": "tiny", "messages": [{"role": "user", "content": question}, *more], **body}
    return http().post(f"{setting.url}/v1/chat/completions", json=chat, headers=ANN)


def text(response: httpx.Response) -> str:
    """The answer."""
    assert response.status_code == 200, response.text
    said: str = response.json()["choices"][0]["message"]["content"]
    return said


@both
def test_requests_and_responses_pass_as_they_are(setting: Setting) -> None:
    async def echo(scope: Scope, body: bytes, send: Send) -> None:
        await answer(send, 418, {"path": scope["path"], "query": scope["query_string"].decode(), "size": len(body)})

    setting.stable.respond = echo
    asked = {"x-request-id": "mine", "X-Forwarded-For": "6.6.6.6", "x-request-timeout-seconds": "0", **ANN}
    response = httpx.post(f"{setting.url}/v1/a%20b?c=d", content=iter([b"x" * 99, b"y"]), headers=asked)
    assert (response.status_code, response.json()) == (418, {"path": "/v1/a b", "query": "c=d", "size": 100})
    assert len(response.headers.get_list("date")) == len(response.headers.get_list("content-length")) == 1
    seen = setting.stable.headers[0]
    assert seen[b"host"] == setting.url.removeprefix("http://").encode()
    assert (seen[b"x-request-id"], seen[b"authorization"]) == (b"mine", b"Bearer ann")
    assert seen[b"x-forwarded-for"] == b"127.0.0.1", "a client does not choose the address in the audit log"
    assert b"x-request-timeout-seconds" not in seen, "with it, a client would change the limits of Ray Serve's proxy"
    assert httpx.get(f"{setting.url}/v1/models").json()["size"] == 0


@both
def test_a_stream_passes_event_by_event_and_one_that_is_left_ends(setting: Setting) -> None:
    sent = asyncio.Event()

    async def slowly(scope: Scope, body: bytes, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
        sent.set()
        assert (await scope["receive"]())["type"] == "http.disconnect"
        setting.stable.gone += 1

    setting.stable.respond = slowly
    with httpx.stream("POST", f"{setting.url}/v1/chat/completions", json={}, timeout=30) as response:
        assert next(response.iter_lines()) == "data: {}"
    wait_until(lambda: setting.stable.gone == 1)


@both
def test_an_answer_whose_client_leaves_before_it_begins_ends(setting: Setting) -> None:
    async def silent(scope: Scope, body: bytes, send: Send) -> None:
        assert (await scope["receive"]())["type"] == "http.disconnect"
        setting.stable.gone += 1

    setting.stable.respond = silent
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{setting.url}/v1/chat/completions", json={}, timeout=0.5)
    wait_until(lambda: setting.stable.gone == 1)


def test_a_conversation_stays_where_it_is_and_the_canary_gets_its_share(setting: Setting) -> None:
    setting.start_canary(share=0.25)
    said = Counter(text(ask(setting, f"question {number}")) for number in range(80))
    assert 4 <= said["canary"] <= 36, "0.25 of 80, and 4.1 standard deviations"
    for number in range(20):
        assert text(ask(setting, f"question {number}", turns=3)) == text(ask(setting, f"question {number}"))
    other = [text(ask(setting, "question 0", user=f"user {number}")) for number in range(30)]
    assert set(other) == {"stable", "canary"}, "another user's conversation is another"


@both
def test_what_fails_on_the_canary_is_answered_by_the_stable_version_until_a_burst_ends_it(setting: Setting) -> None:
    async def fail(scope: Scope, body: bytes, send: Send) -> None:
        await answer(send, 500, {"error": {}})

    setting.canary.respond = fail
    setting.start_canary(share=0.5)
    started = time.monotonic()
    assert {text(ask(setting, f"question {number}")) for number in range(40)} == {"stable"}
    assert setting.rolled_back() == "5 of its last 5 responses failed"
    assert time.monotonic() - started < 30
    assert len(setting.canary.bodies) == 5
    assert json.loads(setting.canary.bodies[0]) in [json.loads(body) for body in setting.stable.bodies]


@both
def test_a_canary_that_dies_loses_no_request_and_ends_its_streams_with_an_error_event(setting: Setting) -> None:
    async def break_off(scope: Scope, body: bytes, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await send({"type": "http.response.body", "body": b'data: {"choices": []}\n\ndata: {"ch', "more_body": True})
        raise RuntimeError

    setting.canary.respond = break_off
    setting.start_canary(share=0.5)
    responses = [ask(setting, f"question {number}", stream=True) for number in range(8)]
    broken = [response for response in responses if b"choices" in response.content and b"error" in response.content]
    assert broken
    assert len(broken) == len(setting.canary.bodies)
    last = broken[0].text.strip().rpartition("\n\n")[2]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "replica_lost"


@pytest.mark.parametrize(("status", "reason"), [(503, "it is not ready any more"), (None, "it did not answer 3")])
def test_a_canary_that_is_not_ready_or_silent_is_taken_back_without_any_request(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, status: int | None, reason: str
) -> None:
    monkeypatch.setattr("vila_ops.serve.router.keeper.PROBE_SECONDS", 0.1)
    if status is None:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        setting.tracks[1] = setting.track(2, f"http://127.0.0.1:{port}")
    else:
        setting.canary.status = status
    setting.start_canary()
    assert setting.rolled_back().startswith(reason)


def test_a_slow_canary_is_taken_back_by_the_sequential_test(setting: Setting) -> None:
    async def slowly(scope: Scope, body: bytes, send: Send) -> None:
        await asyncio.sleep(0.3)
        await answer(send, 200, completion("canary"))

    setting.canary.respond = slowly
    setting.start_canary(share=0.3)
    for number in range(400):
        ask(setting, f"question {number}")
        if setting.register.load().canary is None:
            break
    assert setting.rolled_back().startswith("slower than the stable version")
    assert text(ask(setting, "afterwards")) == "stable"


def test_the_same_conversation_again_and_again_is_counted_once(setting: Setting) -> None:
    """Else one bad conversation of a client would be taken for many."""

    async def refuse(scope: Scope, body: bytes, send: Send) -> None:
        await answer(send, 400, {"error": {}})

    setting.canary.respond = setting.stable.respond = refuse
    setting.start_canary(share=0.5)
    questions = [f"question {number}" for number in range(10)]
    assert all(ask(setting, question).status_code == 400 for question in questions)
    on_canary = json.loads(setting.canary.bodies[0])["messages"][0]["content"]
    assert all(ask(setting, on_canary).status_code == 400 for _ in range(40))
    time.sleep(1)
    assert setting.register.load().canary is not None


@both
def test_a_retired_track_ends_when_its_last_stream_has_ended(setting: Setting) -> None:
    go_on = asyncio.Event()

    async def stream(scope: Scope, body: bytes, send: Send) -> None:
        if scope["method"] == "GET":
            await answer(send, 200, completion("stable"))
            return
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        while not go_on.is_set():  # set by another thread
            await asyncio.sleep(0.02)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    setting.stable.respond = stream
    old, new = setting.tracks
    with httpx.stream("POST", f"{setting.url}/v1/chat/completions", json={}, timeout=30) as response:
        lines = response.iter_lines()
        assert next(lines) == "data: 1"
        setting.register.change(lambda state: state.with_changes({"stable": new, "retired": (old,)}))
        wait_until(lambda: text(httpx.get(setting.url)) == "canary")
        time.sleep(1)
        assert setting.stopped == []
        go_on.set()
        assert [line for line in lines if line] == ["data: [DONE]"]
    wait_until(lambda: setting.stopped == [old])
    wait_until(lambda: setting.register.load().retired == ())


def test_a_promotion_does_not_wait_for_a_track_that_takes_long_to_end(setting: Setting) -> None:
    ending, end = threading.Event(), threading.Event()

    def slowly(track: Track) -> None:
        ending.set()
        end.wait(60)
        setting.stopped.append(track)

    setting.stop = slowly
    old, (stable, promoted) = setting.track(3, "http://127.0.0.1:9"), setting.tracks
    setting.register.change(lambda state: state.with_changes({"retired": (old,)}))
    assert ending.wait(60)
    try:
        setting.register.change(lambda state: state.with_changes({"stable": promoted, "retired": (old, stable)}))
        wait_until(lambda: text(httpx.get(setting.url)) == "canary")
        assert setting.stopped == []
    finally:
        end.set()
    wait_until(lambda: setting.register.load().retired == ())
    assert old in setting.stopped
    assert stable in setting.stopped


@both
@pytest.mark.parametrize("stream", [False, True])
def test_an_error_of_serves_proxy_becomes_one_of_openai_s_form(setting: Setting, stream: bool) -> None:
    """The proxy ends so when it loses the only replica before it has answered; a server makes of it a plain text."""

    async def lost(scope: Scope, body: bytes, send: Send) -> None:
        return

    setting.stable.respond = lost
    response = ask(setting, "hello", stream=stream)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "no_replica")
    assert response.headers["x-request-id"]


@both
def test_one_scrape_has_the_counters_of_all_replicas(setting: Setting) -> None:
    counted = [Metrics(model="tiny", version=number, replica=f"replica-{number}") for number in (1, 2)]
    for metrics, tokens in zip(counted, (3, 4), strict=True):
        metrics.generation_tokens.inc(tokens)
        metrics.whole.observe(0.3)

    async def show(scope: Scope, body: bytes, send: Send) -> None:
        assert dict(scope["headers"])[b"authorization"] == b"Bearer ann"
        await plain(send, 200, counted[scope["server"][1] == httpx.URL(setting.urls[1]).port].text())

    setting.stable.respond = setting.canary.respond = show
    setting.start_canary()
    response = http().get(f"{setting.url}/metrics", headers=ANN)
    families = list(text_string_to_metric_families(response.text))
    assert len({family.name for family in families}) == len(families), "Prometheus wants a family in one place"
    samples = {
        (sample.name, sample.labels["model_version"], sample.labels["replica"]): sample.value
        for family in families
        for sample in family.samples
        if sample.name.endswith(("_total", "_count"))
    }
    for name, values in {
        "vllm:generation_tokens_total": (3, 4),
        "vllm:e2e_request_latency_seconds_count": (1, 1),
    }.items():
        assert (samples[name, "1", "replica-1"], samples[name, "2", "replica-2"]) == values

    setting.register.change(lambda state: state.with_changes({"canary": None}))
    wait_until(lambda: "replica-2" not in http().get(f"{setting.url}/metrics", headers=ANN).text)


def test_metrics_are_shown_to_those_to_whom_a_replica_shows_them(setting: Setting) -> None:
    async def refuse(scope: Scope, body: bytes, send: Send) -> None:
        await answer(send, 403, {"error": {"code": "missing_scope"}})

    setting.stable.respond = refuse
    setting.start_canary()
    response = http().get(f"{setting.url}/metrics", headers=ANN)
    assert (response.status_code, response.json()["error"]["code"]) == (403, "missing_scope")
    assert setting.canary.headers == []


def test_a_track_without_an_answer_has_no_metrics(setting: Setting) -> None:
    async def show(scope: Scope, body: bytes, send: Send) -> None:
        await plain(send, 200, Metrics(model="tiny", version=1, replica="replica-1").text())

    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    setting.stable.respond = show
    setting.tracks[1] = setting.track(2, f"http://127.0.0.1:{port}")
    setting.start_canary()
    assert 'replica="replica-1"' in http().get(f"{setting.url}/metrics", headers=ANN).text


@both
def test_head_is_passed_on_with_the_length_of_the_body_that_is_not_sent(setting: Setting) -> None:
    response = http().head(f"{setting.url}/health")
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["content-length"] == http().get(f"{setting.url}/health").headers["content-length"]


@both
def test_a_service_without_a_replica_answers_503_in_openai_s_form(setting: Setting) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    gone = setting.track(3, f"http://127.0.0.1:{port}/gone@3")
    setting.register.change(lambda state: state.with_changes({"stable": gone}))
    wait_until(lambda: ask(setting, "hello").status_code == 503)
    response = ask(setting, "hello")
    assert (response.json()["error"]["code"], response.headers["retry-after"]) == ("no_replica", "1")
    assert response.headers["x-request-id"]
