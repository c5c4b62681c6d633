"""One question about a held-out picture to a served model, over HTTP as any client would."""

import base64
import json

import httpx

from vila_ops.artifacts.kinds import Dataset, Deployment
from vila_ops.artifacts.store import content
from vila_ops.config import Config, Suite
from vila_ops.data.shards import read_index, read_sample

QUESTION = "What is this?"


class Answered(Config):
    """A question that was really asked, and its answer."""

    question: str
    picture: str
    """PNG as a data URL."""
    truth: str
    reply: str
    model: str
    """Digest that the answering replica loaded, as it said itself."""
    url: str


def ask(deployment: Deployment, held_out: Dataset, suite: Suite, *, question: str = QUESTION) -> Answered:
    """Ask about the first picture of the suite's side of the split. Raises httpx.HTTPStatusError when refused."""
    captioned = {name for name, source in suite.mixture.sources.items() if source.render == "caption"}
    rows = read_index(content(held_out)).to_pylist()
    row = next(row for row in rows if row["split"] == suite.split and row["source"] in captioned)
    sample = read_sample(content(held_out), shard=row["shard"], offset=row["offset"], key=row["key"])
    picture = "data:image/png;base64," + base64.b64encode(sample.images[0]).decode()
    response = httpx.post(f"{deployment.url}/v1/chat/completions", json=request(picture, question), timeout=120)
    response.raise_for_status()
    said = response.json()
    reply = said["choices"][0]["message"]["content"]
    return Answered(
        question=question,
        picture=picture,
        truth=sample.text,
        reply=reply,
        model=said["system_fingerprint"],
        url=deployment.url,
    )


def curl(answered: Answered) -> str:
    """The same question as one command line."""
    body = json.dumps(request(answered.picture, answered.question))
    return f"curl -s {answered.url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"


def request(picture: str, question: str) -> dict[str, object]:
    """The body of the question."""
    parts = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": question}]
    return {"model": "vila", "messages": [{"role": "user", "content": parts}], "max_tokens": 24}
