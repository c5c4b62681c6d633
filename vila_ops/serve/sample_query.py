"""One question about a held-out image to a served model, over HTTP like any client."""

import json
import shlex

from vila_ops.artifacts.kinds import Dataset, Deployment
from vila_ops.config import Config, Suite
from vila_ops.data.shards import data_url, index_of, samples_of
from vila_ops.serve import endpoint
from vila_ops.serve.credentials import KEY_VARIABLE, authorization

QUESTION = "What is this?"


class SampleAnswer(Config):
    """A question that was sent to a service, and its answer."""

    question: str
    image: str
    """As a data URL."""
    truth: str
    """Caption of the image, or the text of its record."""
    reply: str
    name: str
    """Name of the served model."""
    model: str
    """Digest of the model, from the response."""
    url: str


def query_sample(
    deployment: Deployment, held_out: Dataset, suite: Suite, *, question: str = QUESTION
) -> SampleAnswer | None:
    """Ask about the first image of the suite's split, a captioned one where there is one; None without an image.

    Raises httpx.HTTPStatusError when refused.
    """
    captioned = {name for name, source in suite.mixture.sources.items() if source.render == "caption"}
    rows = [row for row in index_of(held_out).to_pylist() if row["split"] == suite.split and row["num_images"]]
    if not rows:
        return None
    row = next((row for row in rows if row["source"] in captioned), rows[0])
    (sample,) = samples_of(held_out, [row])
    image = data_url(sample.images[0])
    payload = {**request(model_name(deployment.url), image, question), "store": False}  # it is not one of people's
    response = endpoint.client().post(
        f"{deployment.url}/v1/chat/completions", json=payload, headers=authorization(), timeout=120
    )
    completion = response.raise_for_status().json()
    return SampleAnswer(
        question=question,
        image=image,
        truth=sample.text,
        reply=completion["choices"][0]["message"]["content"],
        name=completion["model"],
        model=completion["system_fingerprint"],
        url=deployment.url,
    )


def curl(answer: SampleAnswer) -> str:
    """The command line that sends the same question."""
    target = f"{answer.url}/v1/chat/completions -H 'Content-Type: application/json'"
    if authorization():
        target += f' -H "Authorization: Bearer ${KEY_VARIABLE}"'
    return f"curl -s {target} -d {shlex.quote(body(answer))}"


def body(answer: SampleAnswer) -> str:
    """The body of the same question as JSON text."""
    return json.dumps(request(answer.name, answer.image, answer.question))


def model_name(url: str) -> str:
    """The name under which an endpoint serves its model."""
    listed = endpoint.client().get(f"{url}/v1/models", headers=authorization(), timeout=30)
    name: str = listed.raise_for_status().json()["data"][0]["id"]
    return name


def request(name: str, image: str, question: str) -> dict[str, object]:
    """The body of a chat request: an image (data URL) and a question about it."""
    parts = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": question}]
    return {"model": name, "messages": [{"role": "user", "content": parts}], "max_tokens": 24}
