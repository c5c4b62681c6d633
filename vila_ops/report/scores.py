"""The metrics of a report as rows of a forest plot, `official` beside `corrected` and published numbers. Pure."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vila_ops.eval.report import Metric, MetricRole, ReportMetric
from vila_ops.report.baselines import Published, published
from vila_ops.report.drawing import Axis, axis

COLUMN = re.compile(r"_(official|corrected)(?=$|_)")
"""The column in a metric's name, where it has two; the shots and the policy of failed items come after it."""
ROLES: dict[MetricRole, str] = {
    "model": "",
    "control": ", shuffled images",
    "chance": ", chance",
    "gap": ", worth of the matched image",
}
"""What a row's label has after the metric's name."""


@dataclass(frozen=True)
class ScoreRow:
    """One number with its interval, or two where the columns differ."""

    label: str
    kind: MetricRole
    metric: Metric
    """The official column, or the metric itself where it has no columns."""
    corrected: Metric | None
    """None where there is no such column."""
    published: tuple[Published, ...]

    @property
    def differs(self) -> bool:
        """Whether the corrected column has other numbers than the official one."""
        other = self.corrected
        return other is not None and (other.value, other.low, other.high, other.n) != (
            *(self.metric.value, self.metric.low, self.metric.high, self.metric.n),
        )


@dataclass(frozen=True)
class ScorePanel:
    """Rows of one unit on one axis."""

    unit: str
    axis: Axis
    rows: tuple[ScoreRow, ...]
    zero: float | None
    """Position of zero in percent, for differences."""


def score_rows(metrics: Sequence[ReportMetric], settings: Mapping[str, Any], num_items: int) -> list[ScoreRow]:
    """The rows of a benchmark in the order of its metrics; settings and number of items are the benchmark's.

    A metric that has only a corrected column has a row of its own.
    """
    columns: dict[tuple[str, MetricRole], dict[str, ReportMetric]] = {}
    for metric in metrics:
        match = COLUMN.search(metric.name)
        name = COLUMN.sub("", metric.name)
        columns.setdefault((name, metric.role), {})[match[1] if match else "official"] = metric
    return [
        ScoreRow(
            label=f"{name}{'' if 'official' in both else ' (corrected)'}{ROLES[role]}",
            kind=role,
            metric=both.get("official") or both["corrected"],
            corrected=both.get("corrected") if "official" in both else None,
            published=published(both["official"].measure, settings, num_items)
            if role == "model" and "official" in both
            else (),
        )
        for (name, role), both in columns.items()
    ]


def score_panels(rows: Sequence[ScoreRow]) -> list[ScorePanel]:
    """The rows by unit; differences have panels of their own, with a line at zero."""
    groups: dict[tuple[Literal["values", "gaps"], str], list[ScoreRow]] = {}
    for row in rows:
        groups.setdefault(("gaps" if row.kind == "gap" else "values", row.metric.unit), []).append(row)
    return [_panel(unit, group, is_gap=kind == "gaps") for (kind, unit), group in groups.items()]


def _panel(unit: str, rows: Sequence[ScoreRow], *, is_gap: bool) -> ScorePanel:
    metrics = [metric for row in rows for metric in (row.metric, row.corrected) if metric is not None]
    numbers = [number for metric in metrics for number in (metric.value, metric.low, metric.high)]
    numbers += [one.value for row in rows for one in row.published]
    scale = axis([*numbers, 0.0] if is_gap else numbers, ticks=4)
    return ScorePanel(unit, scale, tuple(rows), scale.at(0.0) if is_gap else None)


def headline(rows: Sequence[ScoreRow]) -> ScoreRow | None:
    """The row by which a benchmark is known: one with published numbers, else the first one over the most items."""
    own = [row for row in rows if row.kind == "model"]
    return max(own, key=lambda row: (bool(row.published), row.metric.n), default=None)
