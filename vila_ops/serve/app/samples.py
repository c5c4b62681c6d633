"""Requests that are kept with their answers, and what people say of them: raw records for the next training.

PLACE/records/ID.json has a request and its answer, PLACE/ratings/ID-*.json each rating, and PLACE/rated/ID-*.json the
conversations that end with an answer that was called good or with the right one. The `messages` source reads the last.
The name of each file begins with the id of the response, which leads to the model (`response_id`).
"""

import json
import logging
import secrets
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from vila_ops.artifacts.kinds import ModelVersion
from vila_ops.artifacts.store import backend
from vila_ops.config.serve import Samples
from vila_ops.errors import VilaError
from vila_ops.serve.app.errors import ApiError

REMOVED = "[removed]"
"""What stands in place of redacted text."""
SWEEP_SECONDS = 3600.0
"""Between two looks for files that are too old."""
DAY_SECONDS = 86_400.0
MAX_BODY_BYTES = 64 * 2**10
WAITING = 64
"""Requests that may wait to be written; while there are more, none is kept."""
DRAWS = 2**53
"""Equally likely numbers, of which one is drawn for each request."""
DIGITS = 16
"""Of a model's digest in the id of a response."""
RESPONSE = r"^chatcmpl-[0-9a-f]{1,16}-[0-9a-f]{32}$"
"""The id of a response."""

Json = dict[str, Any]
log = logging.getLogger(__name__)


def response_id(digest: str) -> str:
    """A new id of a response, in which the digest of the model begins."""
    return f"chatcmpl-{digest[:DIGITS]}-{uuid.uuid4().hex}"


class Feedback(BaseModel):
    """What a person says of a response."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: Annotated[str, StringConstraints(pattern=RESPONSE)]
    """Of the response."""
    rating: Literal["good", "bad"]
    right_answer: Annotated[str, Field(min_length=1, max_length=20_000)] | None = None


def parse_feedback(body: bytes) -> Feedback:
    """The feedback of a body. Raises ApiError 400."""
    try:
        return Feedback.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise ApiError(400, f"{name}: {first['msg']}", param=name or None, code="invalid_value") from None


class SampleStore:
    """Writes and removes the records of one service."""

    def __init__(self, rules: Samples, version: ModelVersion) -> None:
        assert rules.place is not None, "set by the spec"
        self._rules, self._version, self._place = rules, version, rules.place
        self._redact = rules.expressions()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="samples")
        self._places = threading.Semaphore(WAITING)
        self._swept = time.monotonic()
        self._writer.submit(self._sweep)

    def drawn(self) -> bool:
        """Whether to keep the next request."""
        return secrets.randbelow(DRAWS) < self._rules.share * DRAWS

    def keep(self, response: str, messages: Sequence[Mapping[str, Any]], *, answer: str) -> None:
        """Keep the messages of a request with their answer, in the background."""
        if self._places.acquire(blocking=False):
            self._writer.submit(self._keep, response, messages, answer)
        else:
            log.warning("%s was not kept: %d requests wait to be written to %s", response, WAITING, self._place)

    def rate(self, feedback: Feedback, *, key: str | None) -> bool:
        """Keep a rating; whether the conversation was kept too. Blocks. Raises errors of the store."""
        name = f"{feedback.id}-{secrets.token_hex(4)}"
        right = None if feedback.right_answer is None else self._clean(feedback.right_answer)
        said = {"rating": feedback.rating, "right_answer": right, "key": key}
        kept = backend(self._place).read(f"{self._place}/records/{feedback.id}.json")
        self._create(f"ratings/{name}.json", {"id": feedback.id, "at": int(time.time()), **said})
        if kept is not None and (right is not None or feedback.rating == "good"):
            record = json.loads(kept)
            if right is not None:
                record["messages"][-1]["content"] = right
            self._create(f"rated/{name}.json", {**record, "id": name, "rating": feedback.rating})
        return kept is not None

    def close(self) -> None:
        """Return when everything is written."""
        self._writer.shutdown()

    def _keep(self, response: str, messages: Sequence[Mapping[str, Any]], answer: str) -> None:
        try:
            turns = [self._turn(one) for one in messages]
            if all(turn is not None for turn in turns):
                said = [*turns, {"role": "assistant", "content": self._clean(answer)}]
                self._write(f"records/{response}.json", {**self._facts(response), "messages": said})
        except Exception:  # nobody reads this future
            log.exception("%s was not kept", response)
        finally:
            self._places.release()

    def _facts(self, response: str) -> Json:
        version = self._version
        facts = {"name": version.name, "version": version.version, "digest": version.checkpoint.digest}
        return {"id": response, "at": int(time.time()), "model": facts}

    def _turn(self, message: Mapping[str, Any]) -> Json | None:
        """A message as it is kept; None for one that must not be."""
        parts: list[Json] = []
        for part in message["content"]:
            if part["type"] == "text":
                parts.append({"type": "text", "text": self._clean(part["text"])})
                continue
            url = part["image_url"]["url"]
            if not self._rules.images or not url.startswith("data:"):
                return None
            parts.append({"type": "image_url", "image_url": {"url": url}})
        return {"role": message["role"], "content": parts}

    def _clean(self, text: str) -> str:
        for pattern in self._redact:
            text = pattern.sub(REMOVED, text)
        return text

    def _write(self, name: str, record: Json) -> None:
        try:
            self._create(name, record)
            if time.monotonic() - self._swept > SWEEP_SECONDS:
                self._sweep()
        except (OSError, VilaError) as error:
            log.error("%s/%s was not kept: %s", self._place, name, error)

    def _create(self, name: str, record: Json) -> None:
        backend(self._place).create(f"{self._place}/{name}", json.dumps(record).encode() + b"\n")

    def _sweep(self) -> None:
        """Remove what is older than it may be."""
        self._swept = time.monotonic()
        oldest = time.time() - self._rules.keep_days * DAY_SECONDS
        try:
            for entry in backend(self._place).entries(self._place):
                if entry.name.endswith(".json") and entry.changed < oldest:
                    backend(self._place).remove(f"{self._place}/{entry.name}")
        except (OSError, VilaError) as error:
            log.error("old records of %s were not removed: %s", self._place, error)
