"""Why one record of a source cannot be used, while its neighbours can."""

from collections.abc import Mapping
from math import isfinite
from typing import Any

from vila_ops.data.raw.text import fault, json_object
from vila_ops.data.records import Dropped


class Fault(ValueError):
    """Raised inside a reader, which makes a Dropped of it."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason

    def dropped(self, id: str, *, where: str) -> Dropped:
        """What is counted in the record's place."""
        return Dropped(id=id, reason=self.reason, where=where, detail=str(self))


def checked(text: str, *, what: str) -> str:
    """The text; raises Fault (nul_in_text, lone_surrogate) where it holds what text must not."""
    if reason := fault(text):
        raise Fault(reason, f"{what} holds a character that is none: {text[:60]!r}; take it out")
    return text


def json_of(data: bytes, *, what: str) -> dict[str, Any]:
    """The object that the bytes are in JSON; raises Fault (invalid_utf8, bad_json, not_an_object)."""
    said = json_object(data, where=what)
    if isinstance(said, Dropped):
        raise Fault(said.reason, f"{what}: {said.detail}")
    return said


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The columns of a row that are finite numbers: what cleaning can compare."""
    return {
        name: float(value)
        for name, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63 and isfinite(value)
    }
