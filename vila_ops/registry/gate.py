"""Whether a model may become the champion: a pure function of the gate and of the metrics of two reports."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from vila_ops.config import Gate
from vila_ops.config.eval import Rule
from vila_ops.eval.report import Report


@dataclass(frozen=True)
class GateMetric:
    """One metric of the model itself."""

    value: float
    lower_is_better: bool = False


@dataclass(frozen=True)
class GateVerdict:
    """The result of a gate, rule by rule."""

    passed: bool
    reasons: tuple[str, ...]
    """One sentence for each bound of each rule, in the gate's order."""


def metrics_of(report: Report) -> dict[str, GateMetric]:
    """The metrics of the model itself, without controls and chance levels. Raises ValueError for a name given twice."""
    metrics: dict[str, GateMetric] = {}
    for metric in report.metrics:
        if metric.role != "model":
            continue
        if metric.name in metrics:
            raise ValueError(f"the report has metric {metric.name!r} twice; rename one of the suite's benchmarks")
        metrics[metric.name] = GateMetric(metric.value, lower_is_better=metric.lower_is_better)
    return metrics


def judge(
    gate: Gate, metrics: Mapping[str, GateMetric], champion_metrics: Mapping[str, GateMetric] | None
) -> GateVerdict:
    """Check every rule of a gate on a model's metrics and, for max_regression, on the champion's (None: no champion).

    Raises ValueError for a metric that the gate names and a report lacks. A value that is not a number passes no rule.
    """
    _check_names(gate.rules, metrics, report="the model's report")
    if champion_metrics is not None:
        compared = tuple(rule for rule in gate.rules if rule.max_regression is not None)
        _check_names(compared, champion_metrics, report="the champion's report")
    checks = [check for rule in gate.rules for check in _checks(rule, metrics, champion_metrics)]
    return GateVerdict(passed=all(passed for passed, _ in checks), reasons=tuple(reason for _, reason in checks))


def _checks(
    rule: Rule, metrics: Mapping[str, GateMetric], champion_metrics: Mapping[str, GateMetric] | None
) -> list[tuple[bool, str]]:
    """Whether each bound of a rule holds, and a sentence that says so."""
    metric = metrics[rule.metric]
    shown = f"{rule.metric} {metric.value:.6g}"
    checks: list[tuple[bool, str]] = []
    if rule.at_least is not None:
        passed = metric.value >= rule.at_least
        checks.append((passed, f"{shown} {'is' if passed else 'is not'} at least {rule.at_least:.6g}"))
    if rule.at_most is not None:
        passed = metric.value <= rule.at_most
        checks.append((passed, f"{shown} {'is' if passed else 'is not'} at most {rule.at_most:.6g}"))
    if rule.max_regression is not None:
        if champion_metrics is None:
            checks.append((not math.isnan(metric.value), f"{shown} has no champion to be compared with"))
        else:
            checks.append(_compare(shown, metric, champion_metrics[rule.metric], max_regression=rule.max_regression))
    return checks


def _compare(shown: str, metric: GateMetric, champion: GateMetric, *, max_regression: float) -> tuple[bool, str]:
    if metric.lower_is_better != champion.lower_is_better:
        raise ValueError(f"{shown}: the two reports disagree on whether lower is better; evaluate both models again")
    regression = metric.value - champion.value if metric.lower_is_better else champion.value - metric.value
    passed = regression <= max_regression
    bound = f"{'at most' if passed else 'more than'} {max_regression:.6g}"
    return passed, f"{shown} is {bound} worse than the champion's {champion.value:.6g}"


def _check_names(rules: tuple[Rule, ...], metrics: Mapping[str, GateMetric], *, report: str) -> None:
    if missing := [rule.metric for rule in rules if rule.metric not in metrics]:
        raise ValueError(f"the gate has rules for {missing}, which {report} lacks; it has {sorted(metrics)}")
