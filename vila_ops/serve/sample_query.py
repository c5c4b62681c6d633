"""One question about a held-out image to a served model, over HTTP as any client would."""

import json
import shlex

import httpx

from vila_ops.artifacts.kinds import Dataset, Deployment
from vila_ops.config import Config, Suite
from vila_ops.data.shards import data_url, index_of, samples_of

QUESTION = "What is this?"


class SampleAnswer(Config):
    """A question that was really asked, and its answer."""

    question: str
    image: str
    """As a data URL."""
    truth: str
    reply: str
    name: str
    """Under which it is served."""
    model: str
    """Digest that the answering replica loaded, as it said itself."""
    url: str


def query_sample(deployment: Deployment, held_out: Dataset, suite: Suite, *, question: str = QUESTION) -> SampleAnswer:
    """Ask about the first image of the suite's side of the split. Raises httpx.HTTPStatusError when refused."""
    captioned = {name for name, source in suite.mixture.sources.items() if source.render == "caption"}
    rows = index_of(held_out).to_pylist()
    row = next(row for row in rows if row["split"] == suite.split and row["source"] in captioned)
    (sample,) = samples_of(held_out, [row])
    image = data_url(sample.images[0])
    asked = request(model_name(deployment.url), image, question)
    response = httpx.post(f"{deployment.url}/v1/chat/completions", json=asked, timeout=120)
    response.raise_for_status()
    said = response.json()
    reply = said["choices"][0]["message"]["content"]
    return SampleAnswer(
        question=question,
        image=image,
        truth=sample.text,
        reply=reply,
        name=said["model"],
        model=said["system_fingerprint"],
        url=deployment.url,
    )


def curl(answered: SampleAnswer) -> str:
    """The same question as one command line."""
    where = f"{answered.url}/v1/chat/completions -H 'Content-Type: application/json'"
    return f"curl -s {where} -d {shlex.quote(body(answered))}"


def body(answered: SampleAnswer) -> str:
    """The question as JSON."""
    return json.dumps(request(answered.name, answered.image, answered.question))


def model_name(url: str) -> str:
    """The name under which an endpoint serves its model."""
    name: str = httpx.get(f"{url}/v1/models", timeout=30).raise_for_status().json()["data"][0]["id"]
    return name


def request(name: str, image: str, question: str) -> dict[str, object]:
    """The body of the question."""
    parts = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": question}]
    return {"model": name, "messages": [{"role": "user", "content": parts}], "max_tokens": 24}
