"""Rows of the items table: what a target answered to each request, and its scores. Nothing else reads these files.

items.parquet     of a benchmark's result, a row for each request
answers.parquet   of a sealed shard, a response for each request

A failure is a status and never a text, so that no parser reads it as an answer. An empty answer is an answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

Status = Literal["ok", "unreadable", "too_long", "not_finite", "refused", "timeout", "error"]
"""unreadable: an image is missing or damaged. too_long: prompt and answer exceed the context. not_finite: a likelihood
is NaN or infinite. refused, timeout, error: what an endpoint did after all retries."""


@dataclass(frozen=True)
class Response:
    """What a target gave to one request."""

    status: Status = "ok"
    detail: str = ""
    """What went wrong."""
    answer: str | None = None
    """The text that was generated, or the label of the likeliest continuation."""
    finish_reason: str | None = None
    nats: tuple[float, ...] = ()
    """Negative log-likelihood of each continuation."""
    tokens: tuple[int, ...] = ()
    """Tokens of each continuation."""
    values: tuple[float, ...] = ()
    """What a request for hidden states keeps of them."""
    prompt_hash: str = ""
    """sha256 of the token ids and images of the prompt; of its messages where an endpoint was asked."""
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    seconds: float = field(default=0.0, compare=False)
    """Time of the request, or its share of that of its batch. Not in the files: digests do not depend on times."""


@dataclass(frozen=True)
class ItemRow:
    """One request of an item, its response and its scores."""

    item: str
    group: str
    slices: tuple[str, ...]
    condition: str
    rotation: int
    shots: tuple[str, ...]
    response: Response
    reference_hash: str
    """sha256 of the item's references as canonical JSON."""
    judge_reply: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict)

    @property
    def answer(self) -> str | None:
        """The answer; None where there is none or the request failed."""
        return self.response.answer

    @property
    def ok(self) -> bool:
        """Whether the target answered."""
        return self.response.status == "ok"


_TEXT, _TEXTS, _NUMBERS = pa.string(), pa.list_(pa.string()), pa.list_(pa.float64())
_RESPONSE = {
    "status": _TEXT,
    "detail": _TEXT,
    "answer": _TEXT,
    "finish_reason": _TEXT,
    "nats": _NUMBERS,
    "tokens": pa.list_(pa.int32()),
    "values": _NUMBERS,
    "prompt_hash": _TEXT,
    "prompt_tokens": pa.int32(),
    "answer_tokens": pa.int32(),
}
_ROW = {
    "item": _TEXT,
    "group": _TEXT,
    "slices": _TEXTS,
    "condition": _TEXT,
    "rotation": pa.int32(),
    "shots": _TEXTS,
    **_RESPONSE,
    "reference_hash": _TEXT,
    "judge_reply": _TEXT,
    "scores": pa.map_(pa.string(), pa.float64()),
}


def write_rows(path: Path, rows: Sequence[ItemRow]) -> None:
    """Write an items table."""
    _write(path, _ROW, [{**_own(row), **_own(row.response), "scores": list(row.scores.items())} for row in rows])


def read_rows(path: Path, seconds: Sequence[float] = ()) -> tuple[ItemRow, ...]:
    """The rows of an items table, in their order, with the seconds of each."""
    return tuple(
        ItemRow(
            **{**_tuples(row, _ROW, _RESPONSE), "scores": dict(row["scores"])},
            response=replace(_response(row), seconds=seconds[number] if seconds else 0.0),
        )
        for number, row in enumerate(pq.read_table(path).to_pylist())
    )


def write_responses(path: Path, responses: Mapping[str, Response]) -> None:
    """Write responses by the hash of their requests."""
    columns = {"request": _TEXT, **_RESPONSE}
    _write(path, columns, [{"request": key, **_own(response)} for key, response in responses.items()])


def read_responses(path: Path) -> dict[str, Response]:
    """Responses by the hash of their requests."""
    return {row["request"]: _response(row) for row in pq.read_table(path).to_pylist()}


def _write(path: Path, columns: Mapping[str, Any], rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(list(columns.items()))), path)


def _own(one: ItemRow | Response) -> dict[str, Any]:
    values = {each.name: getattr(one, each.name) for each in fields(one) if each.name not in ("response", "seconds")}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _response(row: Mapping[str, Any]) -> Response:
    return Response(**_tuples(row, _RESPONSE))


def _tuples(row: Mapping[str, Any], columns: Mapping[str, Any], but: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The values of some columns, lists as tuples."""
    values = {name: row[name] for name in columns if name not in (but or ())}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
