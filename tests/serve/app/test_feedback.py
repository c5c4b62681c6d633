"""Kept requests and feedback become raw records that the `messages` source reads; by default nothing is kept."""

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.serve.app.live import HELLO, MODEL, ScriptedEngine, client_of, endpoint, image_part, png, wait_until
from tests.serve.app.test_access import made
from vila_ops.artifacts.kinds import ModelVersion
from vila_ops.config.serve import Samples
from vila_ops.config.sources import Messages
from vila_ops.data.raw.files import Span
from vila_ops.data.records import Image, Record
from vila_ops.data.sources import messages
from vila_ops.generate.request import Delta
from vila_ops.serve.app import samples as samples_module
from vila_ops.serve.app.keys import KeyLimits
from vila_ops.serve.app.samples import REMOVED, SampleStore

Versions = tuple[ModelVersion, ModelVersion]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "samples"


@pytest.fixture
def url(versions: Versions, scripted: ScriptedEngine, place: Path) -> Iterator[str]:
    """An endpoint that keeps every request and answers `Six.`"""
    scripted.script = [Delta(scripted.tokenizer.text_ids("Six.")), Delta([], "stop")]
    with endpoint(versions[0], scripted, samples=Samples(share=1, place=str(place))) as address:
        yield address


def ask(url: str, *, stream: bool = False) -> str:
    """The id of the response to a question with an image."""
    content = [{"type": "text", "text": "Ask ann@example.org, +49 30 1234567: how many?"}, image_part(png(8, 8))]
    asked: Any = {"model": MODEL, "messages": [{"role": "user", "content": content}]}
    create = client_of(url).chat.completions.create
    if stream:
        return str(next(iter([chunk.id for chunk in create(**asked, stream=True)])))
    return str(create(**asked).id)


def records(folder: Path) -> list[dict[str, Any]]:
    """The files of a folder, as soon as there are some."""
    wait_until(lambda: list(folder.glob("*.json")))
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def test_a_request_that_is_not_to_be_stored_is_not_kept(url: str, place: Path) -> None:
    turns: Any = [{"role": "user", "content": "Mine alone."}]
    client_of(url).chat.completions.create(model=MODEL, messages=turns, store=False)
    response = ask(url)  # its record is written after that of the first one would have been
    assert [record["id"] for record in records(place / "records")] == [response]


def say(url: str, *, api_key: str | None = None, **feedback: Any) -> httpx.Response:
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    return httpx.post(f"{url}/v1/feedback", json=feedback, headers=headers)


@pytest.mark.parametrize("stream", [False, True])
def test_the_right_answer_to_a_kept_request_is_a_record_for_training(
    url: str, versions: Versions, place: Path, tmp_path: Path, stream: bool
) -> None:
    response = ask(url, stream=stream)
    (kept,) = records(place / "records")
    assert kept["id"] == response
    assert kept["model"] == {"name": MODEL, "version": 1, "digest": versions[0].checkpoint.digest}
    assert response.split("-")[1] == versions[0].checkpoint.digest[:16], "the id leads to the model by itself"
    assert kept["messages"][-1] == {"role": "assistant", "content": "Six."}

    said = say(url, id=response, rating="bad", right_answer="Seven, says bob@example.org")
    assert (said.status_code, said.json()) == (200, {"id": response, "object": "feedback", "request_kept": True})
    source = Messages(path=str(place / "rated"), licence="CC0-1.0")
    (file,) = messages.raw_files(source, {}, cache=tmp_path / "cache")
    span = Span(name=file.name, path=file.path, digest=file.digest, start=0, stop=file.count, mark=0)
    ((record,),) = messages.read(source, {}, span)
    assert isinstance(record, Record)
    (question, shown), (answer,) = (turn.parts for turn in record.turns)
    assert question == "Ask [removed], [removed]: how many?"
    assert isinstance(shown, Image)
    assert answer == "Seven, says [removed]"


def test_a_rating_alone_trains_only_where_the_answer_was_good(url: str, place: Path) -> None:
    response = ask(url)
    records(place / "records")
    assert say(url, id=response, rating="bad").status_code == 200
    assert not (place / "rated").exists()
    assert say(url, id=response, rating="good").status_code == 200
    (rated,) = records(place / "rated")
    assert rated["messages"][-1]["content"] == "Six."
    assert sorted(one["rating"] for one in records(place / "ratings")) == ["bad", "good"]


def test_feedback_on_a_request_that_was_not_kept_is_a_rating_alone(url: str, place: Path) -> None:
    said = say(url, id=f"chatcmpl-{'0' * 16}-{'1' * 32}", rating="good", right_answer="Seven")
    assert said.json()["request_kept"] is False
    assert records(place / "ratings")[0]["right_answer"] == "Seven"
    assert not (place / "rated").exists()


@pytest.mark.parametrize(
    ("feedback", "param"),
    [
        ({"id": "../../etc", "rating": "good"}, "id"),
        ({"id": f"chatcmpl-0-{'1' * 32}", "rating": "best"}, "rating"),
        ({"id": f"chatcmpl-0-{'1' * 32}", "rating": "good", "more": 1}, "more"),
        ({"id": f"chatcmpl-0-{'1' * 32}", "rating": "good", "right_answer": "x" * 20_001}, "right_answer"),
    ],
)
def test_wrong_feedback_is_refused_by_name(url: str, place: Path, feedback: dict[str, Any], param: str) -> None:
    said = say(url, **feedback)
    assert (said.status_code, said.json()["error"]["param"]) == (400, param)
    assert not place.exists()


def test_feedback_counts_as_a_request_of_its_key(versions: Versions, scripted: ScriptedEngine, place: Path) -> None:
    keys = place.with_name("keys.json")
    rare = made(keys, limits=KeyLimits(requests_per_minute=2))
    rating: Any = {"id": f"chatcmpl-0-{'1' * 32}", "rating": "good", "api_key": rare}
    rules = Samples(share=1, place=str(place))
    with endpoint(versions[0], scripted, samples=rules, access={"key_file": str(keys)}) as address:
        assert [say(address, **rating, **more).status_code for more in ({"wrong": 1}, {})] == [400, 200]
        refused = say(address, **rating)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        with pytest.raises(openai.RateLimitError, match="2 requests a minute"):
            client_of(address, rare).chat.completions.create(model=MODEL, messages=HELLO)  # type: ignore[arg-type]
        assert say(address, **{**rating, "api_key": made(keys)}).status_code == 200
    assert len(records(place / "ratings")) == 2


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Until it is set, nothing more is redacted."""
    event, clean = threading.Event(), SampleStore._clean

    def held_up(store: SampleStore, text: str) -> str:
        event.wait(60)
        return clean(store, text)

    monkeypatch.setattr(SampleStore, "_clean", held_up)
    yield event
    event.set()


def test_requests_are_answered_while_text_is_redacted_and_few_wait_for_it(
    versions: Versions, scripted: ScriptedEngine, place: Path, held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples_module, "WAITING", 2)
    scripted.script = [Delta([], "stop")]
    with endpoint(versions[0], scripted, samples=Samples(share=1, place=str(place))) as address:
        responses = [ask(address) for _ in range(4)]
        held.set()
    assert {record["id"] for record in records(place / "records")} == set(responses[:2])


LONG = 300_000
"""Characters, through which a search that goes back for each of them takes minutes."""


@pytest.mark.parametrize(
    "text",
    ["-", "a.", "1", "1 ", "a@", "@a", "a@b.", "+1(", "\u00e4\u0308-", "a@b.c ", "12345678901x"],
)  # fmt: skip
def test_no_text_makes_redacting_long(versions: Versions, place: Path, text: str) -> None:
    """Seconds of the CPU even of a slow machine."""
    store = SampleStore(Samples(share=1, place=str(place)), versions[0])
    started = time.thread_time()
    for hostile in (text * (LONG // len(text)), "x@" + text * (LONG // len(text)) + "!", "1" + text * 9 + " " * LONG):
        store._clean(hostile)
    assert time.thread_time() - started < 30
    store.close()


def test_no_expression_of_ones_own_makes_redacting_long(versions: Versions, place: Path) -> None:
    """With these, the library `re` would take years."""
    store = SampleStore(Samples(share=1, redact=("(a+)+$", "(a|aa)+$", "(.*a){12}b"), place=str(place)), versions[0])
    text = "a" * 10_000 + "!"
    started = time.thread_time()
    assert store._clean(text) == text
    assert time.thread_time() - started < 30
    assert store._clean("baa") == f"b{REMOVED}"
    store.close()


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("ann@example.org", "[removed]"),
        ("Ask \u00fcnal_9+x@m\u00fcnchen-s\u00fcd.example.de!", "Ask [removed]!"),
        ("+49 (30) 123-4567, 4111 1111 1111 1111", "[removed], [removed]"),
        ("\u0664\u0665\u0666 \u0664\u0665\u0666 \u0664\u0665\u0666\u0664", "[removed]"),
        ("a @ b, 12345678, @name, x@y", "a @ b, 12345678, @name, x@y"),
    ],
)
def test_addresses_and_long_numbers_are_removed(versions: Versions, place: Path, text: str, kept: str) -> None:
    store = SampleStore(Samples(share=1, place=str(place)), versions[0])
    assert store._clean(text) == kept
    store.close()


def test_what_could_not_be_kept_is_told(
    versions: Versions, place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("RE2 ran out of memory")

    store = SampleStore(Samples(share=1, place=str(place)), versions[0])
    monkeypatch.setattr(store, "_clean", fails)
    store.keep("r1", [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}], answer="Hi")
    store.close()
    assert "r1 was not kept" in caplog.text
    assert "RE2 ran out of memory" in caplog.text


def test_records_go_when_their_time_is_over(versions: Versions, scripted: ScriptedEngine, place: Path) -> None:
    files = [place / "records" / "old.json", place / "ratings" / "new.json"]
    for path, days in zip(files, (8, 6), strict=True):
        path.parent.mkdir(parents=True)
        path.write_text("{}")
        os.utime(path, (time.time() - days * 86_400,) * 2)
    with endpoint(versions[0], scripted, samples=Samples(share=1, keep_days=7, place=str(place))):
        wait_until(lambda: not files[0].exists())
    assert files[1].exists()


def test_nothing_is_kept_by_default(versions: Versions, scripted: ScriptedEngine, tmp_path: Path) -> None:
    scripted.script = [Delta([], "stop")]
    with endpoint(versions[0], scripted) as address:
        client_of(address).chat.completions.create(model=MODEL, messages=HELLO)  # type: ignore[arg-type]
        assert say(address, id="x", rating="good").status_code == 404
        assert "/v1/feedback" not in httpx.get(f"{address}/openapi.json").json()["paths"]
    assert not list(tmp_path.rglob("*.json"))
