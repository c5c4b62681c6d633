"""The scores of a report as a table, with intervals."""

from vila_ops.cli.tables import Row, table
from vila_ops.eval.report import MetricRole, Report, ReportMetric

_HEADER = ("score", "of", "value", "95 % interval", "items", "unit")
_ROLES: dict[MetricRole, str] = {"model": "model", "control": "shuffled", "chance": "chance", "gap": "gap"}


def scores(report: Report) -> list[str]:
    """What was measured on what, and the table of its metrics.

    `shuffled` is the control: the same items with the images of other objects. A gap above zero is what the matched
    images are worth.
    """
    return [
        f"suite {report.suite}, {report.split} split, model {report.model[:12]}",
        "",
        *table([_HEADER, *(_row(metric) for metric in report.metrics)]),
    ]


def _row(metric: ReportMetric) -> Row:
    interval = "" if metric.low == metric.high else f"[{metric.low:.3f}, {metric.high:.3f}]"
    return (metric.name, _ROLES[metric.role], f"{metric.value:.3f}", interval, f"{metric.n:,}", metric.unit)
