"""The scores of a report as a table, with intervals."""

from vila_ops.cli.tables import Row, table
from vila_ops.errors import counted
from vila_ops.eval.report import MetricRole, Report, ReportMetric

_HEADER = ("score", "of", "value", "95 % interval", "items", "unit")
_ROLES: dict[MetricRole, str] = {"model": "model", "control": "shuffled", "chance": "chance", "gap": "gap"}


def scores(report: Report) -> list[str]:
    """What was measured on what, and the table of its metrics.

    `shuffled` is the control: the same items with the images of other objects. A gap above zero is what the matched
    images are worth.
    """
    return [
        f"suite {report.suite}, {f'{report.split} split, ' if report.split else ''}model {report.model[:12]}",
        *(f"{name}: {counted(count, 'request')} {status}" for name, count, status in _failed(report)),
        *(f"{name}: no {metric}: {reason}" for name, metric, reason in _undefined(report)),
        "",
        *table([_HEADER, *(_row(metric) for metric in report.metrics)]),
    ]


def _failed(report: Report) -> list[tuple[str, int, str]]:
    """What has no answer, by benchmark."""
    return [
        (name, count, status) for name, result in report.benchmarks.items() for status, count in result.failed.items()
    ]


def _undefined(report: Report) -> list[tuple[str, str, str]]:
    """Metrics without a number, and why, by benchmark."""
    return [
        (name, metric, reason)
        for name, result in report.benchmarks.items()
        for metric, reason in result.undefined.items()
    ]


def _row(metric: ReportMetric) -> Row:
    interval = "" if metric.low == metric.high else f"[{metric.low:.3f}, {metric.high:.3f}]"
    return (metric.name, _ROLES[metric.role], f"{metric.value:.3f}", interval, f"{metric.n:,}", metric.unit)
