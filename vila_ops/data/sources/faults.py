"""Faults of single records."""

from collections.abc import Mapping
from math import isfinite
from typing import Any

from vila_ops.data.raw.text import fault, json_object
from vila_ops.data.records import Dropped


class Fault(ValueError):
    """A record that cannot be used. Readers raise it for one record and turn it into a Dropped."""

    def __init__(self, reason: str, detail: str, *, is_bad: bool = True) -> None:
        super().__init__(detail)
        self.reason = reason
        self.is_bad = is_bad

    def dropped(self, id: str, *, where: str) -> Dropped:
        """The record as dropped, for the counts and the list of dropped records."""
        return Dropped(id=id, reason=self.reason, where=where, detail=str(self), is_bad=self.is_bad)


def checked(text: str, *, what: str) -> str:
    """The text itself. Raises Fault (nul_in_text, lone_surrogate) if it has an invalid character."""
    if reason := fault(text):
        raise Fault(reason, f"{what} has an invalid character: {text[:60]!r}; remove it")
    return text


def json_of(data: bytes, *, what: str) -> dict[str, Any]:
    """The bytes as a JSON object. Raises Fault (invalid_utf8, bad_json, not_an_object)."""
    value = json_object(data, where=what)
    if isinstance(value, Dropped):
        raise Fault(value.reason, f"{what}: {value.detail}")
    return value


def finite_numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The columns of a row that are finite numbers: its scores."""
    return {
        name: float(value)
        for name, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63 and isfinite(value)
    }
