"""Whether a model may become the champion: a pure function of the gate and of two reports' numbers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vila_ops.config import Gate
from vila_ops.config.eval import Rule


@dataclass(frozen=True)
class GateMetric:
    """One number of a report about the model itself."""

    value: float
    lower_is_better: bool = False


@dataclass(frozen=True)
class GateVerdict:
    """What a gate says, rule by rule."""

    passed: bool
    reasons: tuple[str, ...]
    """One sentence for each bound of each rule, in the gate's order."""


def metrics_of(report: dict[str, Any]) -> dict[str, GateMetric]:
    """The model's own numbers of a report.json; its controls and chance levels are left out."""
    found: dict[str, GateMetric] = {}
    for record in report["metrics"]:
        if record["role"] != "model":
            continue
        if record["name"] in found:
            raise ValueError(f"the report has metric {record['name']!r} twice")
        value = math.nan if record["value"] is None else float(record["value"])
        found[record["name"]] = GateMetric(value, lower_is_better=bool(record.get("lower_is_better", False)))
    return found


def judge(
    gate: Gate, metrics: Mapping[str, GateMetric], champion_metrics: Mapping[str, GateMetric] | None
) -> GateVerdict:
    """Every rule of the gate against a model's metrics and, for max_regression, the champion's (None: no champion).

    Raises ValueError for a metric that the gate names and a report lacks. A value that is not a number passes no rule.
    """
    _have_all(gate.rules, metrics, of="the model's report")
    if champion_metrics is not None:
        compared = tuple(rule for rule in gate.rules if rule.max_regression is not None)
        _have_all(compared, champion_metrics, of="the champion's report")
    checks = [check for rule in gate.rules for check in _checks(rule, metrics, champion_metrics)]
    return GateVerdict(passed=all(held for held, _ in checks), reasons=tuple(text for _, text in checks))


def _checks(
    rule: Rule, metrics: Mapping[str, GateMetric], champion_metrics: Mapping[str, GateMetric] | None
) -> list[tuple[bool, str]]:
    own = metrics[rule.metric]
    shown = f"{rule.metric} {own.value:.6g}"
    checks: list[tuple[bool, str]] = []
    if rule.at_least is not None:
        held = own.value >= rule.at_least
        checks.append((held, f"{shown} {'is' if held else 'is not'} at least {rule.at_least:.6g}"))
    if rule.at_most is not None:
        held = own.value <= rule.at_most
        checks.append((held, f"{shown} {'is' if held else 'is not'} at most {rule.at_most:.6g}"))
    if rule.max_regression is not None:
        if champion_metrics is None:
            checks.append((not math.isnan(own.value), f"{shown} has no champion to be compared with"))
        else:
            checks.append(_compare(shown, own, champion_metrics[rule.metric], max_regression=rule.max_regression))
    return checks


def _compare(shown: str, own: GateMetric, champion: GateMetric, *, max_regression: float) -> tuple[bool, str]:
    if own.lower_is_better != champion.lower_is_better:
        raise ValueError(f"{shown}: the two reports disagree on whether lower is better; evaluate both anew")
    loss = own.value - champion.value if own.lower_is_better else champion.value - own.value
    held = loss <= max_regression
    by = f"{'at most' if held else 'more than'} {max_regression:.6g}"
    return held, f"{shown} is {by} worse than the champion's {champion.value:.6g}"


def _have_all(rules: tuple[Rule, ...], metrics: Mapping[str, GateMetric], *, of: str) -> None:
    if missing := [rule.metric for rule in rules if rule.metric not in metrics]:
        raise ValueError(f"the gate asks for {missing}, which {of} lacks; it has {sorted(metrics)}")
