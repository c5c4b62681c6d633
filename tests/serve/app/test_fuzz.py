"""Random requests to the real engine, and random feedback: each is answered or refused, and the server never fails.

VILA_REQUESTS sets how many (`make faults`); test_limits.py sends more, to an engine that stops at once.
"""

import base64
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.hostile_images import seeds
from tests.serve.app.live import HELLO, MODEL, endpoint, image_part, png
from vila_ops.artifacts.kinds import ModelVersion
from vila_ops.config.serve import Samples
from vila_ops.generate.engine import Engine
from vila_ops.generate.torch_engine.engine import InProcessEngine
from vila_ops.serve.app.samples import MAX_BODY_BYTES

EXAMPLES = int(os.environ.get("VILA_REQUESTS", "1000")) // 5
WHOLE = seeds()
IMAGES = [
    png(9, 9), WHOLE["jpeg_exif"], WHOLE["webp_animated"], WHOLE["gif_transparent"], WHOLE["png_palette_alpha"],
    WHOLE["jpeg"][:200], b"",
]  # fmt: skip
SCHEMAS: list[dict[str, Any]] = [
    {},
    {"type": "integer", "minimum": -3, "maximum": 3},
    {"enum": ["Ann", 1, None, {"a": []}]},
    {"type": "string", "pattern": "^(a|b)+$", "maxLength": 3},
    {"type": "string", "format": "date"},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
    {"type": "object", "properties": {"a": {"$ref": "#"}}, "additionalProperties": False},
    {"type": "object", "properties": {"\u00e4": {"const": "\n"}}, "required": ["\u00e4"]},
    {"anyOf": [{"type": "number", "multipleOf": 0.5}, {"type": "null"}]},
    {"type": "integer", "minimum": 2, "maximum": 1},
    {"type": "integer", "multipleOf": 9_999_991},
    {"type": "string", "pattern": "(((\\p{L}|\u00e9))|\\p{L})"},
    {"type": "string", "pattern": ".*a.{200}.*b.{200}"},
    {"not": {}},
]


def shown(data: bytes) -> dict[str, Any]:
    """An image part without a media type."""
    return image_part("data:;base64," + base64.b64encode(data).decode())


TEXTS = st.one_of(
    st.text(max_size=30), st.sampled_from(["Hello", "<image>", "<|im_end|>", "\ud800", "\x00", "e\u0301 \U0001f642"])
)
PARTS = st.one_of(
    TEXTS.map(lambda text: {"type": "text", "text": text}),
    st.sampled_from(IMAGES).map(shown),
)
MESSAGES = st.lists(
    st.fixed_dictionaries({
        "role": st.sampled_from(["user", "user", "user", "assistant", "system"]),
        "content": TEXTS | st.lists(PARTS, min_size=1, max_size=3),
    }),
    min_size=1,
    max_size=3,
) | st.just(HELLO)  # fmt: skip
FORMATS = st.one_of(
    st.sampled_from([{"type": "text"}, {"type": "json_object"}]),
    st.sampled_from(SCHEMAS).map(
        lambda schema: {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    ),
)  # fmt: skip
SAMPLING = {
    "temperature": st.floats(0, 2) | st.sampled_from([5e-324, 1e-40, 1.0]),
    "top_p": st.floats(0, 1, exclude_min=True),
    "top_k": st.integers(-1, 2**31),
    "min_p": st.floats(0, 1),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0, 2, exclude_min=True),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "n": st.integers(1, 3),
    "stop": st.text(min_size=1, max_size=3) | st.lists(st.text(min_size=1, max_size=2), max_size=4),
    "logprobs": st.booleans(),
    "top_logprobs": st.integers(0, 20),
    "logit_bias": st.dictionaries(st.integers(0, 600).map(str), st.floats(-100, 100), max_size=4),
    "response_format": FORMATS,
    "stream": st.booleans(),
}
REQUESTS = st.fixed_dictionaries(
    {"model": st.just(MODEL), "messages": MESSAGES, "max_tokens": st.integers(1, 4)}, optional=SAMPLING
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FEEDBACK = st.fixed_dictionaries(
    {},
    optional={
        "id": st.from_regex(re.compile(r"chatcmpl-[0-9a-f]{1,16}-[0-9a-f]{32}", re.ASCII), fullmatch=True) | VALUES,
        "rating": st.sampled_from(["good", "bad"]) | VALUES,
        "right_answer": TEXTS | st.just("-" * 20_000) | st.just("x" * MAX_BODY_BYTES) | VALUES,
        "more": VALUES,
    },
)


@pytest.fixture(scope="module")
def asked(
    versions: tuple[ModelVersion, ModelVersion], real_engine: Engine, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    """A client of an endpoint with the real engine, which keeps each request."""
    own = InProcessEngine(real_engine.loaded, max_batch=4)  # type: ignore[attr-defined]  # an endpoint closes its engine
    place: Path = tmp_path_factory.mktemp("samples")
    with (
        endpoint(versions[0], own, samples=Samples(share=1, place=str(place))) as url,
        httpx.Client(base_url=url, headers={"Content-Type": "application/json"}, timeout=60) as client,
    ):
        yield client


def failed(answer: httpx.Response) -> bool:
    """Whether the server failed, before a stream or in it."""
    events = answer.text.splitlines() if answer.headers["content-type"].startswith("text/event-stream") else []
    return (answer.status_code >= 500 and answer.status_code != 503) or any("server_error" in one for one in events)


@given(REQUESTS)
@settings(max_examples=EXAMPLES, deadline=None)
def test_no_request_makes_the_real_engine_fail(asked: httpx.Client, request_: dict[str, Any]) -> None:
    answer = asked.post("/v1/chat/completions", content=json.dumps(request_).encode())
    assert not failed(answer), answer.text
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    elif request_.get("stream"):
        assert answer.text.endswith("data: [DONE]\n\n")
    else:
        choices = answer.json()["choices"]
        assert len(choices) == request_.get("n", 1)
        if request_.get("response_format", {"type": "text"})["type"] != "text" and not request_.get("stop"):
            for choice in choices:
                assert choice["finish_reason"] == "length" or [json.loads(choice["message"]["content"])]


@given(FEEDBACK, st.integers(0, 20))
@settings(max_examples=EXAMPLES, deadline=None)
def test_no_feedback_makes_the_server_fail(asked: httpx.Client, feedback: dict[str, Any], cut: int) -> None:
    body = json.dumps(feedback).encode()
    answer = asked.post("/v1/feedback", content=body[: len(body) - cut] if cut < 3 else body)
    assert answer.status_code in (200, 400, 413)
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
