"""One question about a held-out image to a served model, over HTTP like any client. The answer is streamed."""

import json
import shlex
from typing import Any

from vila_ops.artifacts.kinds import Dataset, Deployment
from vila_ops.config import Config, Suite
from vila_ops.data.shards import data_url, index_of, samples_of
from vila_ops.errors import Unreachable
from vila_ops.serve import endpoint
from vila_ops.serve.credentials import KEY_VARIABLE, authorization

QUESTION = "What is this?"
Json = dict[str, Any]


class StreamedAnswer(Config):
    """An answer of a service, put together from its stream."""

    reply: str
    tokens: int
    """Of the reply, as the service counts them."""
    name: str
    """Name of the served model."""
    model: str
    """Digest of the model, from the stream."""


class SampleAnswer(StreamedAnswer):
    """A question that was sent to a service, and its answer."""

    question: str
    image: str
    """As a data URL."""
    truth: str
    """Caption of the image, or the text of its record."""
    url: str


def query_sample(
    deployment: Deployment, held_out: Dataset, suite: Suite, *, question: str = QUESTION
) -> SampleAnswer | None:
    """Ask about the first image of the suite's split, a captioned one where there is one; None without an image.

    Raises as `ask`.
    """
    captioned = {name for name, source in suite.mixture.sources.items() if source.render == "caption"}
    rows = [row for row in index_of(held_out).to_pylist() if row["split"] == suite.split and row["num_images"]]
    if not rows:
        return None
    row = next((row for row in rows if row["source"] in captioned), rows[0])
    (sample,) = samples_of(held_out, [row])
    image = data_url(sample.images[0])
    answer = ask(deployment.url, image, question)
    return SampleAnswer(**dict(answer), question=question, image=image, truth=sample.text, url=deployment.url)


def ask(url: str, image: str, question: str) -> StreamedAnswer:
    """Send a question about an image (data URL), which is not one of people's: no endpoint keeps it.

    Raises httpx.HTTPStatusError when refused, and Unreachable where the stream tells an error or ends early.
    """
    response = endpoint.client(url).post(
        f"{url}/v1/chat/completions",
        json={**request(model_name(url), image, question), "store": False},
        headers=authorization(),
        timeout=120,
    )
    chunks = chunks_of(response.raise_for_status().content, url)
    return StreamedAnswer(
        reply="".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]),
        tokens=chunks[-1]["usage"]["completion_tokens"],
        name=chunks[-1]["model"],
        model=chunks[-1]["system_fingerprint"],
    )


def chunks_of(stream: bytes, url: str) -> list[Json]:
    """The chunks of an answer that ended as it should. Raises Unreachable for any other.

    Only bytes tell where an event ends: the texts may hold characters that str.splitlines takes as ends of lines.
    """
    *events, _ = [event.removeprefix(b"data: ") for event in stream.split(b"\n\n")]
    last = events.pop() if events else b""
    if last.startswith(b'{"error"'):
        raise Unreachable(f"{url} failed while it answered: {json.loads(last)['error']['message']}")
    chunks: list[Json] = [json.loads(event) for event in events] if last == b"[DONE]" else []
    if not any(choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]):
        raise Unreachable(
            f"{url} sent a part of an answer: a whole stream has a finish_reason and ends with [DONE]; see the log of "
            f"the service, and run again"
        )
    return chunks


def curl(url: str, data: str) -> str:
    """The command line that sends a request and shows its answer as it comes; `data` is JSON, or @ and a file."""
    target = f"{url}/v1/chat/completions -H 'Content-Type: application/json'"
    if authorization():
        target += f' -H "Authorization: Bearer ${KEY_VARIABLE}"'
    return f"curl -sN {target} -d {shlex.quote(data)}"


def body(answer: SampleAnswer) -> str:
    """The body of the same question as JSON text."""
    return json.dumps(request(answer.name, answer.image, answer.question))


def model_name(url: str) -> str:
    """The name under which an endpoint serves its model."""
    listed = endpoint.client(url).get(f"{url}/v1/models", headers=authorization(), timeout=30)
    name: str = listed.raise_for_status().json()["data"][0]["id"]
    return name


def request(name: str, image: str, question: str) -> Json:
    """The body of a chat request: an image (data URL) and a question about it."""
    parts = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": question}]
    return {
        "model": name,
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": 24,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
