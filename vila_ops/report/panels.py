"""Forest plots: rows of numbers with their intervals on one axis. Pure."""

from dataclasses import dataclass
from typing import Any, Literal

from vila_ops.report.drawing import Axis, axis

Json = dict[str, Any]


@dataclass(frozen=True)
class ReportRow:
    """One line of a forest plot."""

    label: str
    kind: Literal["model", "control", "chance"]
    metric: Json


@dataclass(frozen=True)
class Panel:
    """Rows on one axis."""

    axis: Axis
    rows: list[ReportRow]
    reference: float | None
    """Position of a line through all rows in percent: the chance level, or zero for gaps."""


def forest(rows: list[ReportRow], *, zero: bool = False) -> Panel:
    """Rows on a common axis with a line at the chance level, or at zero."""
    values = [row.metric[key] for row in rows for key in ("value", "low", "high") if row.metric[key] is not None]
    scale = axis([*values, 0.0] if zero else values, ticks=4)
    chances = [row.metric["value"] for row in rows if row.kind == "chance" and row.metric["value"] is not None]
    level = 0.0 if zero else chances[0] if len(chances) == 1 else None
    return Panel(scale, rows, None if level is None else scale.at(level))
