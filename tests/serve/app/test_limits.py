"""What one client sends stops no other (uploads, headers, images, queues), and no body makes the server fail."""

import gzip
import json
import os
import re
import struct
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.download.test_address import forms
from tests.serve.app.live import (
    HELLO,
    MODEL,
    SERVICE,
    ScriptedEngine,
    connected,
    endpoint,
    http,
    image_part,
    png,
    upload,
    wait_until,
)
from tests.serve.app.test_access import made
from vila_ops.artifacts.kinds import ModelVersion
from vila_ops.generate.request import Delta
from vila_ops.serve.app import chat
from vila_ops.serve.app.keys import KeyLimits
from vila_ops.serve.backends import http_protocol

Versions = tuple[ModelVersion, ModelVersion]
CHAT: dict[str, Any] = {"model": MODEL, "messages": HELLO}
AS_JSON: dict[str, Any] = {**CHAT, "response_format": {"type": "json_object"}}


@pytest.fixture(scope="module")
def engine(module_scripted: ScriptedEngine) -> ScriptedEngine:
    """An engine that answers at once."""
    module_scripted.script = [Delta([], "stop")]
    return module_scripted


@pytest.fixture(scope="module")
def url(versions: Versions, engine: ScriptedEngine) -> Iterator[str]:
    """An endpoint with the default limits."""
    with endpoint(versions[0], engine) as url:
        yield url


def ask(url: str, *parts: Any) -> int | str:
    """The status, or the message of a refusal."""
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "Hi"}]}]
    answer = http().post(f"{url}/v1/chat/completions", json={"model": MODEL, "messages": messages})
    return 200 if answer.status_code == 200 else f"{answer.status_code}: {answer.json()['error']['message']}"


def uploads(url: str) -> int:
    """Bodies that are being received."""
    lines = http().get(f"{url}/metrics").text.splitlines()
    return int(float(next(line for line in lines if line.startswith("vila:uploads_under_way{")).rpartition(" ")[2]))


def test_many_unfinished_uploads_hold_nobody_up(url: str) -> None:
    with ExitStack() as stack:
        for _ in range(64):
            upload(url, stack, b"{")
        wait_until(lambda: uploads(url) == 64)
        assert ask(url) == 200
    wait_until(lambda: uploads(url) == 0)


def test_an_upload_has_an_end(versions: Versions, engine: ScriptedEngine) -> None:
    with endpoint(versions[0], engine, limits={"upload_seconds": 0.2}) as url, ExitStack() as stack:
        answer = upload(url, stack, b"{").recv(4096)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'"upload_timeout"' in answer


def test_bodies_share_a_budget_that_the_oldest_upload_makes_way_for(versions: Versions, engine: ScriptedEngine) -> None:
    with endpoint(versions[0], engine, limits={"held_bytes": 150_000}) as url, ExitStack() as stack:
        first = upload(url, stack, b" " * 80_000)
        wait_until(lambda: uploads(url) == 1)
        upload(url, stack, b" " * 80_000)
        assert first.recv(4096).startswith(b"HTTP/1.1 408 ")
        wait_until(lambda: uploads(url) == 1)


@pytest.mark.parametrize(
    "head", [b"X: y\r\n" * 101, b"X: " + b"y" * 70_000, b"".join(b"X-%d: %s\r\n" % (n, b"y" * 900) for n in range(99))]
)
def test_floods_of_headers_are_refused(url: str, head: bytes) -> None:
    with ExitStack() as stack:
        connection = connected(url, stack)
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n" + head + b"\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 431 ")


def test_slow_headers_are_cut_off(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEADER_SECONDS", 0.1)
    for start in (b"", b"GET /v1/models HTTP/1.1\r\nHost: loc"):
        with ExitStack() as stack:
            connection = connected(url, stack)
            connection.sendall(start)
            assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")
            assert connection.recv(4096) == b""


def test_a_full_queue_is_429_with_the_time_to_wait(versions: Versions, scripted: ScriptedEngine) -> None:
    scripted.script = [1e6, Delta([], "stop")]
    with (
        endpoint(versions[0], scripted, limits={"max_waiting": 1}) as url,
        httpx.Client(timeout=30) as client,
        ExitStack() as stack,
    ):
        for _ in range(5):  # a batch of 4, and one that waits
            request = client.stream("POST", f"{url}/v1/chat/completions", json=CHAT | {"stream": True})
            stack.enter_context(request)
        wait_until(lambda: scripted.running == 5)
        refused = client.post(f"{url}/v1/chat/completions", json=CHAT)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json()["error"]["code"] == "queue_full"
        stack.close()
        wait_until(lambda: scripted.running == 0)
        scripted.script = [Delta([], "stop")]
        wait_until(lambda: client.post(f"{url}/v1/chat/completions", json=CHAT).status_code == 200)


@pytest.fixture
def held_grammar(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Set when a schema is being checked; until the second is set, the check does not end."""
    checking, end = threading.Event(), threading.Event()

    def held_up(_: str) -> None:
        checking.set()
        end.wait(60)

    monkeypatch.setattr(chat, "grammar_of", held_up)
    yield checking, end
    end.set()


def test_a_request_has_its_places_while_its_schema_is_checked(
    versions: Versions, engine: ScriptedEngine, held_grammar: tuple[threading.Event, threading.Event]
) -> None:
    checking, end = held_grammar
    with endpoint(versions[0], engine, limits={"max_waiting": 0}) as url, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(http().post, f"{url}/v1/chat/completions", json={**AS_JSON, "n": 4})
        assert checking.wait(60)
        refused = http().post(f"{url}/v1/chat/completions", json=CHAT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        end.set()
        assert asked.result().status_code == 200
        assert http().post(f"{url}/v1/chat/completions", json=CHAT).status_code == 200


def test_the_check_of_a_schema_ends_with_the_time_of_its_request(
    versions: Versions, engine: ScriptedEngine, held_grammar: tuple[threading.Event, threading.Event]
) -> None:
    service = SERVICE.with_changes({"request_timeout_seconds": 0.2})
    with endpoint(versions[0], engine, service=service) as url:
        answer = http().post(f"{url}/v1/chat/completions", json=AS_JSON)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        held_grammar[1].set()


def test_a_schema_that_is_refused_counts_as_a_request(
    versions: Versions, engine: ScriptedEngine, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.json"
    headers = {"Authorization": f"Bearer {made(keys, limits=KeyLimits(requests_per_minute=1))}"}
    wrong = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}
    with endpoint(versions[0], engine, access={"key_file": str(keys)}) as url:
        bodies = [{**CHAT, "response_format": wrong}, CHAT]
        answers = [http().post(f"{url}/v1/chat/completions", json=body, headers=headers) for body in bodies]
    assert [answer.status_code for answer in answers] == [400, 429]


def bomb(side: int) -> bytes:
    """A PNG of few bytes and many pixels, all of them black."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack("!I", len(data)) + kind + data + struct.pack("!I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes((side // 8 + 1) * side), 9)
    header = struct.pack("!IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (bomb(8000), "8000 x 8000 pixels"),
        (gzip.compress(png(9, 9), mtime=0), "gzip archive"),
        (b"BM" + bytes(60), "send one of|BMP"),
    ],
)
def test_bombs_and_formats_that_are_not_listed_are_refused(url: str, data: bytes, says: str) -> None:
    message = ask(url, image_part(data))
    assert re.search(says, str(message))


@pytest.mark.parametrize(
    "start",
    ["data:image/png;charset=utf-8;base64,", "data:;base64,", "DATA:image/PNG;BASE64,", "data:image/webp;base64,"],
)
def test_data_urls_are_read_as_clients_write_them(url: str, start: str) -> None:
    parts = (image_part(png(9, width))["image_url"]["url"].partition(",")[2] for width in range(9, 100))
    encoded = next(one for one in parts if one.endswith("="))
    wrapped = "\r\n".join(encoded[at : at + 40] for at in range(0, len(encoded), 40))
    unpadded = encoded.rstrip("=")
    for form in (encoded, wrapped, encoded.replace("+", "%2B").replace("=", "%3D"), unpadded):
        assert ask(url, image_part(start + form)) == 200


def test_an_image_that_takes_too_long_is_given_up_and_the_next_one_read(
    versions: Versions, engine: ScriptedEngine
) -> None:
    service, limits = SERVICE.with_changes({"max_image_pixels": 40_000_000}), {"decode_seconds": 0.01, "decoders": 1}
    with endpoint(versions[0], engine, service=service, limits=limits) as url:  # 36 megapixels take ten times as long
        assert "could not be decoded" in str(ask(url, image_part(bomb(6000))))
        assert ask(url) == 200


def test_a_killed_decoder_is_replaced(url: str) -> None:
    def is_decoder(process: psutil.Process) -> bool:
        try:
            return "vila_ops.serve.app.decoder" in process.cmdline()
        except psutil.ZombieProcess:  # another test's, which ended
            return False

    def decoders() -> list[psutil.Process]:
        return [one for one in psutil.Process().children() if is_decoder(one)]

    assert ask(url, image_part(png(9, 9))) == 200
    for one in decoders():
        one.kill()
        one.wait()
    answers = [ask(url, image_part(png(9, 9))) for _ in range(3)]
    assert answers[-1] == 200


class Canary(BaseHTTPRequestHandler):
    """Serves an image, and a redirect to it; the server counts connections."""

    def do_GET(self) -> None:
        self.send_response(302 if self.path == "/moved" else 200)
        body = b"" if self.path == "/moved" else png(9, 9)
        self.send_header("Location", "/image.png")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class CountingServer(ThreadingHTTPServer):
    connections = 0

    def verify_request(self, *_: Any) -> bool:
        self.connections += 1
        return True


@pytest.fixture
def canary() -> Iterator[CountingServer]:
    """A server on this machine that no request may reach."""
    server = CountingServer(("127.0.0.1", 0), Canary)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_no_form_of_an_address_reaches_this_machine(
    versions: Versions, engine: ScriptedEngine, canary: CountingServer
) -> None:
    port = canary.server_port
    named = ["localhost", "127.0.0.1", "127.0.0.2", "10.0.0.1", "169.254.169.254", "private.test"]
    remote = {"hosts": named, "ports": [port], "timeout_seconds": 5}
    with endpoint(versions[0], engine, remote_images=remote) as url, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda form: ask(url, image_part(form)), forms(port)))
    assert len(answers) >= 150
    assert all(isinstance(answer, str) and answer.startswith("400: ") for answer in answers)
    assert canary.connections == 0


def test_images_are_fetched_from_listed_hosts_without_redirects(
    versions: Versions, engine: ScriptedEngine, canary: CountingServer
) -> None:
    at = f"http://localhost:{canary.server_port}"
    remote = {"hosts": ["localhost"], "networks": ["127.0.0.0/8", "::1"], "ports": [canary.server_port]}
    with endpoint(versions[0], engine, remote_images=remote) as url:
        assert ask(url, image_part(f"{at}/image.png")) == 200
        assert engine.asked[-1][0].images
        assert "redirect_refused" in str(ask(url, image_part(f"{at}/moved")))
        assert "from localhost only" in str(ask(url, image_part(at.replace("localhost", "127.0.0.1") + "/image.png")))


@pytest.mark.parametrize("bracket", ["[", '{"a":'])
def test_nested_brackets_are_a_400(url: str, bracket: str) -> None:
    headers = {"Content-Type": "application/json"}
    for body in (bracket * 10_000, f'{{"model": "{MODEL}", "messages": {bracket * 10_000}'):
        assert http().post(f"{url}/v1/chat/completions", content=body, headers=headers).status_code == 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)
FIELDS = (
    "model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "n",
    "stop", "logprobs", "top_logprobs", "logit_bias", "stream", "stream_options", "tools", "response_format", "user",
    "metadata", "presence_penalty", "frequency_penalty", "repetition_penalty",
)  # fmt: skip
KEYWORDS = st.sampled_from(["type", "properties", "items", "enum", "pattern", "maxLength", "x-guidance"])
SENSIBLE = st.one_of(
    JSON,
    st.dictionaries(KEYWORDS, JSON, max_size=3).map(
        lambda schema: {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    ),
    st.integers(-2, 40),
    st.floats(-2, 2),
    st.text(max_size=3).map(lambda text: [{"role": "user", "content": text}]),
    st.lists(st.sampled_from(["<image>", "<|im_end|>", "\ud800", "\x00", "data:;base64,", "Hi"]), max_size=3).map(
        lambda texts: [{"role": "user", "content": [{"type": "text", "text": text} for text in texts]}]
    ),
)


@given(st.dictionaries(st.sampled_from(FIELDS), SENSIBLE, max_size=4), st.integers(0, 20))
@settings(max_examples=int(os.environ.get("VILA_REQUESTS", "1000")), deadline=None)
def test_no_request_makes_the_server_fail(fuzzed: httpx.Client, changes: dict[str, Any], cut: int) -> None:
    body = json.dumps(CHAT | changes).encode()
    answer = fuzzed.post("/v1/chat/completions", content=body[: len(body) - cut] if cut < 3 else body)
    assert answer.status_code in (200, 400, 404, 413, 429)
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.fixture(scope="module")
def fuzzed(url: str) -> Iterator[httpx.Client]:
    """A client of the endpoint."""
    with httpx.Client(base_url=url, headers={"Content-Type": "application/json"}, timeout=30) as client:
        yield client
