"""The question that ends a run: its answer is put together from a stream, and what goes wrong in it is told."""

import shutil
import subprocess
from collections.abc import Iterator

import pytest

from tests.serve.app.live import MODEL, ScriptedEngine, endpoint, image_part, png
from vila_ops.artifacts.kinds import ModelVersion
from vila_ops.errors import Unreachable
from vila_ops.generate.request import Delta
from vila_ops.serve.sample_query import SampleAnswer, StreamedAnswer, ask, body, chunks_of, curl

TEXT = "Gr\u00fc\u00dfe\u2028\U0001f642\x85\n\nund\r\nmehr"
"""With all that Python, or a reader of events, may take as the end of a line."""
IMAGE = image_part(png(20, 10))["image_url"]["url"]
BEGUN = b'data: {"choices": [{"delta": {"content": "A"}, "finish_reason": null}]}\n\n'
FINISHED = b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\n'
DONE = b"data: [DONE]\n\n"


@pytest.fixture
def url(versions: tuple[ModelVersion, ModelVersion], scripted: ScriptedEngine) -> Iterator[str]:
    """An endpoint that answers with the text, one token at a time."""
    scripted.script = [*(Delta([token]) for token in scripted.tokenizer.text_ids(TEXT)), Delta([], "stop")]
    with endpoint(versions[0], scripted) as url:
        yield url


def test_the_answer_is_what_the_deltas_say(
    url: str, versions: tuple[ModelVersion, ModelVersion], scripted: ScriptedEngine
) -> None:
    assert ask(url, IMAGE, "What?") == StreamedAnswer(
        reply=TEXT, tokens=len(scripted.tokenizer.text_ids(TEXT)), name=MODEL, model=versions[0].checkpoint.digest
    )
    (prompt, _), *more = scripted.asked
    assert len(prompt.images) == 1
    assert more == []


def test_an_error_in_the_stream_is_told_with_its_message(url: str, scripted: ScriptedEngine) -> None:
    scripted.script = [Delta(scripted.tokenizer.text_ids("word ")), RuntimeError("/secret/path")]
    with pytest.raises(Unreachable, match=rf"{url} failed while it answered: .* the reason is in its log"):
        ask(url, IMAGE, "What?")


@pytest.mark.parametrize(
    "stream", [b"", BEGUN, BEGUN + DONE, BEGUN + FINISHED, BEGUN + FINISHED + DONE[:-2]],
    ids=["nothing", "cut", "no finish_reason", "no [DONE]", "cut in [DONE]"],
)  # fmt: skip
def test_a_part_of_an_answer_is_no_answer(stream: bytes) -> None:
    with pytest.raises(Unreachable, match="http://h:8000 sent a part of an answer"):
        chunks_of(stream, "http://h:8000")


def test_an_event_may_be_cut_by_an_error() -> None:
    """As the router sends it where a replica dies."""
    stream = BEGUN + BEGUN[:30] + b'\n\ndata: {"error": {"message": "the replica is lost"}}\n\n'
    with pytest.raises(Unreachable, match="http://h:8000 failed while it answered: the replica is lost"):
        chunks_of(stream, "http://h:8000")


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
@pytest.mark.parametrize("key", [None, "vila-key"])
def test_the_command_streams_the_answer_to_the_same_question(
    url: str, scripted: ScriptedEngine, monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    monkeypatch.delenv("VILA_API_KEY", raising=False)
    if key:
        monkeypatch.setenv("VILA_API_KEY", key)
    question = "What's `this` $HOME?"
    answer = ask(url, IMAGE, question)
    command = curl(url, body(SampleAnswer(**dict(answer), question=question, image=IMAGE, truth="", url=url)))
    assert command.startswith("curl -sN ")
    assert ("$VILA_API_KEY" in command) is bool(key)
    assert "vila-key" not in command
    out = subprocess.run(["bash", "-euc", command], check=True, capture_output=True).stdout
    chunks = chunks_of(out, url)
    assert "".join(one["delta"].get("content", "") for chunk in chunks for one in chunk["choices"]) == TEXT
    by_us, by_curl = scripted.asked
    assert by_curl[0].input_ids == by_us[0].input_ids
    assert by_curl[0].images == by_us[0].images
