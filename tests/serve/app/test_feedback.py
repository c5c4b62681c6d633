"""Kept requests and feedback become raw records that the `messages` source reads; by default nothing is kept."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.app.live import HELLO, MODEL, ScriptedEngine, client_of, endpoint, image_part, png, wait_until
from vila_ops.artifacts.kinds import ModelVersion
from vila_ops.config.serve import Samples
from vila_ops.config.sources import Messages
from vila_ops.data.raw.files import Span
from vila_ops.data.records import Image, Record
from vila_ops.data.sources import messages
from vila_ops.generate.request import Delta

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


def say(url: str, **feedback: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/feedback", json=feedback)


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
