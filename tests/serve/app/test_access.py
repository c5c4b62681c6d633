"""Keys, hosts, origins and content types: who gets in, on every route of a live endpoint; and what is recorded."""

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import openai
import pytest
from typer.testing import CliRunner

from tests.serve.app.live import HELLO, MODEL, ScriptedEngine, client_of, endpoint, http
from vila_ops.artifacts.kinds import ModelVersion
from vila_ops.cli import app
from vila_ops.config.resources import ServeResources
from vila_ops.config.serve import RequestLimits, Samples
from vila_ops.errors import CorruptArtifact
from vila_ops.generate.request import Delta
from vila_ops.serve.app.admission import Admission
from vila_ops.serve.app.audit import AuditLog, check_log
from vila_ops.serve.app.errors import ApiError
from vila_ops.serve.app.keys import KeyLimits, Scope, create_key, read_keys, revoke_key, rotate_key
from vila_ops.serve.app.metrics import Metrics
from vila_ops.serve.credentials import KEY_VARIABLE, check_key
from vila_ops.serve.page.files import PATHS

CHAT = {"model": MODEL, "messages": HELLO}
RATING = {"id": f"chatcmpl-0-{'0' * 32}", "rating": "good"}
ROUTES = [
    ("GET", "/v1/models"), ("GET", f"/v1/models/{MODEL}"), ("POST", "/v1/chat/completions"), ("POST", "/v1/responses"),
    ("POST", "/v1/feedback"), ("GET", "/v1/feedback"), ("GET", "/v1/nothing"), ("GET", "/version"),
    ("GET", "/openapi.json"), ("GET", "/metrics"), ("GET", "//"),
    ("GET", "/metrics/"), ("GET", "//metrics"), ("GET", "/%6detrics"), ("GET", "/-/routes"),
    ("PUT", "/v1/models"),
]  # fmt: skip


def made(
    path: Path, *, scope: Scope = "chat", lifetime: timedelta | None = None, limits: KeyLimits | None = None
) -> str:
    """A new key."""
    return create_key(path, "someone", scopes=(scope,), lifetime=lifetime, limits=limits or KeyLimits())[1]


def key_id(secret: str) -> str:
    """The id in a key."""
    return secret.split("-")[1]


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A file of keys that does not exist yet."""
    return tmp_path / "keys.json"


@pytest.fixture
def url(
    versions: tuple[ModelVersion, ModelVersion], scripted: ScriptedEngine, keys: Path, tmp_path: Path
) -> Iterator[str]:
    """An endpoint that asks for keys and records what it is asked."""
    scripted.script = [Delta(scripted.tokenizer.text_ids("Hi"), "stop")]
    made(keys)
    access = {"key_file": str(keys), "audit": str(tmp_path / "audit")}
    samples = Samples(share=1, place=str(tmp_path / "samples"))
    with endpoint(versions[0], scripted, access=access, samples=samples) as url:
        yield url


def status(url: str, method: str, path: str, key: str | None) -> int:
    """The status of a request with a key."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    body = RATING if path.endswith("/v1/feedback") else CHAT
    return http().request(method, url + path, headers=headers, json=body if method == "POST" else None).status_code


def test_every_route_wants_a_valid_key_of_its_scope(url: str, keys: Path) -> None:
    good, other = made(keys), made(keys, scope="metrics")
    expired, revoked = made(keys, lifetime=timedelta(0)), made(keys)
    revoke_key(keys, key_id(revoked))
    wrong = [None, "vila-", "x", expired, revoked, good[:-2] + ("aa" if good[-2:] != "aa" else "bb"), good.upper()]
    for method, path in ROUTES:
        answers = {status(url, method, path, key) for key in wrong}
        assert answers == {401}, path
        if path in ("/metrics", "/%6detrics"):
            assert (status(url, method, path, good), status(url, method, path, other)) == (403, 200)
        elif path.startswith("/v1/"):
            assert status(url, method, path, other) == 403
            assert status(url, method, path, good) in (200, 404, 405)
        else:
            assert status(url, method, path, good) == status(url, method, path, other)
            assert status(url, method, path, good) in (200, 404)


def test_health_without_a_key_shows_the_state_alone(url: str, keys: Path) -> None:
    assert http().get(f"{url}/health").json() == {"status": "ok"}
    assert http().get(f"{url}/ready", headers={"Host": "10.1.2.3"}).status_code == 200
    full = http().get(f"{url}/health", headers={"Authorization": f"Bearer {made(keys)}"}).json()
    assert full["replica"] == {"pid": 1}


def test_the_chat_page_is_shown_without_a_key_but_not_under_any_name(
    versions: tuple[ModelVersion, ModelVersion], scripted: ScriptedEngine, url: str
) -> None:
    for path in PATHS:
        answer = http().get(url + path)
        assert answer.status_code == 200
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert status(url, "POST", path, None) == 405
    assert status(url, "GET", "/page/files.py", None) == 401
    with endpoint(versions[0], scripted) as open_url:
        assert http().get(open_url, headers={"Host": "evil.example"}).status_code == 403


def test_keys_end_and_are_rotated_without_a_restart(url: str, keys: Path) -> None:
    first = made(keys)
    assert client_of(url, first).chat.completions.create(**CHAT).choices[0].message.content == "Hi"
    second = rotate_key(keys, key_id(first), grace=timedelta(hours=1))[1]
    assert [status(url, "GET", "/v1/models", key) for key in (first, second)] == [200, 200]
    third = rotate_key(keys, key_id(second), grace=timedelta(0))[1]
    assert [status(url, "GET", "/v1/models", key) for key in (second, third)] == [401, 200]
    revoke_key(keys, key_id(third))
    with pytest.raises(openai.AuthenticationError, match="valid API key"):
        client_of(url, third).models.list()
    for ended in (key_id(third), "00000000"):
        with pytest.raises(ValueError, match=r"already ended|no key"):
            revoke_key(keys, ended)


def test_nobody_gets_in_while_the_file_of_keys_is_damaged(url: str, keys: Path) -> None:
    good, whole = made(keys), keys.read_bytes()
    keys.write_bytes(whole[:-9])
    assert status(url, "GET", "/v1/models", good) == 503
    keys.write_bytes(whole)
    assert status(url, "GET", "/v1/models", good) == 200


def test_the_file_holds_no_key_and_is_its_owners_alone(keys: Path) -> None:
    secret = made(keys)
    assert secret.split("-", 2)[2] not in keys.read_text()
    assert keys.stat().st_mode & 0o777 == 0o600


def test_limits_of_a_key_are_429_with_the_time_to_wait(url: str, keys: Path) -> None:
    rare = made(keys, limits=KeyLimits(requests_per_minute=1))
    client_of(url, rare).chat.completions.create(**CHAT)
    with pytest.raises(openai.RateLimitError, match="1 requests a minute") as caught:
        client_of(url, rare).chat.completions.create(**CHAT)
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
    alone = made(keys, limits=KeyLimits(max_concurrent=1))
    with pytest.raises(openai.RateLimitError, match="1 answers under way"):
        client_of(url, alone).chat.completions.create(**CHAT, n=2)


def test_tokens_of_a_key_are_counted_and_what_was_not_used_is_given_back(
    url: str, keys: Path, scripted: ScriptedEngine
) -> None:
    prompt = len(scripted.tokenizer.prompt([("user", ("Hello",))]))
    used = prompt + len(scripted.tokenizer.text_ids("Hi"))
    client = client_of(url, made(keys, limits=KeyLimits(tokens_per_minute=2 * used + 20)))
    for _ in range(2):
        client.chat.completions.create(**CHAT, max_tokens=20)
    with pytest.raises(openai.RateLimitError, match="tokens a minute") as caught:
        client.chat.completions.create(**CHAT, max_tokens=32)
    assert int(caught.value.response.headers["retry-after"]) >= 1
    with pytest.raises(openai.BadRequestError, match="lower max_tokens"):
        client.chat.completions.create(**CHAT, n=8, max_tokens=32)


def test_one_key_leaves_places_to_others(keys: Path) -> None:
    admission = Admission(RequestLimits(max_waiting=8), Metrics(model=MODEL, version=1, replica=""), max_batch=8)
    for _ in range(2):
        made(keys)
    first, second = read_keys(keys)
    tickets = [admission.admit(first, answers=4) for _ in range(3)]
    with pytest.raises(ApiError, match="12 answers under way, and what is free is for others") as caught:
        admission.admit(first, answers=1)
    assert (caught.value.status, caught.value.code, caught.value.headers["Retry-After"]) == (429, "queue_full", "1")
    admission.admit(second, answers=4)
    tickets[0].close()
    admission.admit(first, answers=4)


def test_usage_tells_the_tokens_that_were_not_read_again(url: str, keys: Path, scripted: ScriptedEngine) -> None:
    scripted.script = [Delta([5], cached_tokens=7), Delta([6]), Delta([], "stop")]
    usage = client_of(url, made(keys)).chat.completions.create(**CHAT, n=2).usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 7


def test_keys_do_not_share_cached_work(url: str, keys: Path, scripted: ScriptedEngine) -> None:
    first, second = made(keys), made(keys)
    for key in (first, first, second):
        client_of(url, key).chat.completions.create(**CHAT)
    salts = [prompt.cache_salt for prompt, _ in scripted.asked]
    assert salts[0] == salts[1] != salts[2]


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example:80"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "LOCALHOST:1"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "localhost:8000", "Origin": "http://localhost:8000"}, 200),
        ({"Origin": "https://chat.example.org"}, 200),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "application/json; charset=utf-8"}, 200),
        ({"Content-Encoding": "gzip"}, 415),
    ],
)  # fmt: skip
def test_a_page_of_another_origin_does_not_reach_an_endpoint_without_keys(
    open_url: str, headers: dict[str, str], expected: int
) -> None:
    answer = http().post(f"{open_url}/v1/chat/completions", json=CHAT, headers=headers)
    assert answer.status_code == expected


@pytest.fixture(scope="module")
def open_url(versions: tuple[ModelVersion, ModelVersion], module_scripted: ScriptedEngine) -> Iterator[str]:
    """An endpoint without keys."""
    module_scripted.script = [Delta([], "stop")]
    with endpoint(versions[0], module_scripted, access={"origins": ["https://chat.example.org"]}) as url:
        yield url


def test_another_address_than_loopback_needs_keys(keys: Path) -> None:
    for host in ("0.0.0.0", "10.0.0.1", "::", "example.org"):
        with pytest.raises(ValueError, match=r"no key is needed there; set access\.key_file"):
            ServeResources(host=host)
        ServeResources.model_validate({"host": host, "access": {"key_file": "keys.json"}})
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        ServeResources(host=host)


def test_deploy_needs_a_key_of_its_endpoint(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    access = ServeResources.model_validate({"access": {"key_file": str(keys)}}).access
    metrics = made(keys, scope="metrics")
    for key in ("", "x", metrics):
        monkeypatch.setenv(KEY_VARIABLE, key)
        with pytest.raises(ValueError, match=KEY_VARIABLE):
            check_key(access)
    monkeypatch.setenv(KEY_VARIABLE, made(keys))
    check_key(access)


def test_the_audit_log_says_who_asked_for_what_and_not_what_was_said(url: str, keys: Path, tmp_path: Path) -> None:
    secret = made(keys)
    client_of(url, secret).chat.completions.create(**CHAT)
    status(url, "GET", "/v1/models", "bad")
    (path,) = (tmp_path / "audit").iterdir()
    deadline = time.monotonic() + 60
    while len(path.read_text().splitlines()) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)  # a line is written after its answer
    start, asked, refused = [json.loads(line) for line in path.read_text().splitlines()]
    assert (start["event"], start["model"]) == ("start", MODEL)
    assert (asked["key"], asked["status"], asked["completion_tokens"] > 0) == (key_id(secret), 200, True)
    assert (refused["key"], refused["status"]) == (None, 401)
    assert "Hello" not in path.read_text()
    assert check_log(path)[0] == 3
    assert check_log(keys.with_name("keys.json.audit.jsonl"))[0] == len(read_keys(keys))


def test_any_change_of_the_audit_log_but_its_end_is_told(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for number in range(5):
        log = AuditLog(path)
        log.write({"event": "request", "number": number})
        log.close()
    lines = path.read_bytes().splitlines(keepends=True)
    changed = [line.replace(b'"number": ', b'"number": 1') for line in lines]
    for at in range(4):
        for forged in ([*lines[:at], changed[at], *lines[at + 1 :]], lines[:at] + lines[at + 1 :],
                       [*lines[: at + 1], lines[at], *lines[at + 1 :]]):  # fmt: skip
            path.write_bytes(b"".join(forged))
            with pytest.raises(CorruptArtifact, match=r"line \d"):
                check_log(path)
    path.write_bytes(b"".join(lines))
    assert check_log(path)[0] == 5


def test_the_command_makes_lists_rotates_and_revokes_keys(keys: Path) -> None:
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["keys", *arguments])
        assert result.exit_code == 0, result.output
        return result.output.strip()

    first = run("create", str(keys), "Ann", "--scope", "chat", "--scope", "metrics", "--days", "9",
                "--requests-per-minute", "6", "--tokens-per-minute", "7", "--max-concurrent", "8")  # fmt: skip
    (entry,) = read_keys(keys)
    assert (entry.id, entry.name, entry.scopes) == (key_id(first), "Ann", ("chat", "metrics"))
    assert (entry.requests_per_minute, entry.tokens_per_minute, entry.max_concurrent) == (6, 7, 8)
    assert entry.expires is not None
    assert abs(entry.expires - datetime.now(UTC) - timedelta(days=9)) < timedelta(minutes=5)
    second = run("rotate", str(keys), entry.id, "--grace-hours", "0")
    run("revoke", str(keys), key_id(second))
    listed = run("list", str(keys))
    assert listed.count("revoked") == 2
    assert "Ann" in listed
    assert run("audit", f"{keys}.audit.jsonl").startswith("3 lines")
