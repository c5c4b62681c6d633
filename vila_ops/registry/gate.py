"""Whether a model may become the champion: a pure function of the gate, a report, a comparison and the training data.

Every rule has to hold, so each is checked at its own level: the chance that a model passes that breaks one of them is
not above the chance of that rule alone, and nothing is adjusted for their number.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from vila_ops.config import Gate
from vila_ops.config.eval import Rule
from vila_ops.errors import did_you_mean
from vila_ops.eval.compare import Comparison, Difference, MetricComparison
from vila_ops.eval.report import Report


@dataclass(frozen=True)
class TrainingData:
    """What the data of one stage was compared with before the stage was trained."""

    stage: str
    left_out: Mapping[str, int]
    """Records that overlap with an evaluation set and were left out, by the reason."""
    against: tuple[str, ...]
    """Names of the evaluation sets; empty: it was compared with none."""


@dataclass(frozen=True)
class Check:
    """One bound of one rule."""

    passed: bool
    reason: str
    """A sentence with the numbers."""


@dataclass(frozen=True)
class GateVerdict:
    """The result of a gate, bound by bound."""

    checks: tuple[Check, ...]
    """In the gate's order."""

    @property
    def passed(self) -> bool:
        """Whether every bound holds."""
        return all(check.passed for check in self.checks)

    @property
    def reason(self) -> str:
        """The sentences that decide: of the bounds that do not hold, or of all where they hold."""
        return "; ".join(check.reason for check in self.checks if check.passed == self.passed)


def metrics_of(report: Report) -> dict[str, float]:
    """The metrics of the model itself, without controls and chance levels. Raises ValueError for a name given twice."""
    metrics: dict[str, float] = {}
    for metric in report.metrics:
        if metric.role != "model":
            continue
        if metric.name in metrics:
            raise ValueError(f"the report has metric {metric.name!r} twice; rename one of the suite's benchmarks")
        metrics[metric.name] = metric.value
    return metrics


def judge(
    gate: Gate, metrics: Mapping[str, float], comparison: Comparison | None, training: Sequence[TrainingData]
) -> GateVerdict:
    """Check every rule of a gate on a model's metrics, on its comparison with the champion and on its training data.

    `comparison` is None without a champion; its baseline is the champion, and its one candidate the model. Raises
    ValueError for a metric or a slice that the gate names and the report or the comparison lacks. A value that is not a
    number passes no rule.
    """
    if missing := [rule.metric for rule in gate.rules if rule.metric not in metrics]:
        raise ValueError(
            f"the gate has rules for {missing}, which the model's report lacks; it has {sorted(metrics)}"
            f"{did_you_mean(missing[0], metrics)}"
        )
    checks: list[Check] = []
    for rule in gate.rules:
        value = metrics[rule.metric]
        checks += _bounds(rule, value)
        if rule.is_compared() and comparison is not None:
            checks += _compared(rule, _metric(comparison, rule.metric))
        elif rule.is_compared():
            reason = f"{rule.metric} {value:.6g} has no champion to be compared with"
            checks.append(Check(passed=not math.isnan(value), reason=reason))
    return GateVerdict((*checks, *(_clean(name, training) for name in gate.clean_of)))


def _bounds(rule: Rule, value: float) -> Iterator[Check]:
    """The bounds of the model's own value."""
    shown = f"{rule.metric} {value:.6g}"
    if rule.at_least is not None:
        passed = value >= rule.at_least
        yield Check(passed, f"{shown} {'is' if passed else 'is not'} at least {rule.at_least:.6g}")
    if rule.at_most is not None:
        passed = value <= rule.at_most
        yield Check(passed, f"{shown} {'is' if passed else 'is not'} at most {rule.at_most:.6g}")


def _metric(comparison: Comparison, name: str) -> MetricComparison:
    for one in comparison.metrics:
        if one.metric == name:
            return one
    reasons = [one.reason for one in comparison.left_out if name == one.metric or name.startswith(one.benchmark)]
    raise ValueError(
        f"the gate has a rule on {name!r}, by which the model cannot be compared with the champion: "
        f"{'; '.join(reasons) or 'neither was measured on it'}"
    )


def _compared(rule: Rule, metric: MetricComparison) -> Iterator[Check]:
    """The bounds of the difference, over all items and then over each slice."""
    yield from _of_difference(rule, rule.metric, metric.overall, lower_is_better=metric.lower_is_better)
    known = sorted({*metric.slices, *metric.skipped_slices})
    for name in known if rule.slices == "all" else rule.slices:
        shown = f"{rule.metric} on {name!r}"
        if name in metric.slices:
            yield from _of_difference(rule, shown, metric.slices[name], lower_is_better=metric.lower_is_better)
        elif name in metric.skipped_slices:
            yield Check(passed=False, reason=f"{shown} has no interval: {metric.skipped_slices[name]}")
        else:
            raise ValueError(f"{rule.metric} has no slice {name!r}; it has {known}{did_you_mean(name, known)}")


def _of_difference(rule: Rule, shown: str, one: Difference, *, lower_is_better: bool) -> Iterator[Check]:
    low, high = (-one.high, -one.low) if lower_is_better else (one.low, one.high)
    gain = -one.value if lower_is_better else one.value
    told = (
        f"{shown} {one.candidate:.6g}, champion {one.baseline:.6g}: gain {gain:+.4g} (95 % interval {low:+.4g} to "
        f"{high:+.4g}, {one.n} items, {one.groups} groups)"
    )
    if rule.max_regression is not None:
        passed = low >= -rule.max_regression
        yield Check(passed, f"{told} is {'not' if passed else 'maybe'} more than {rule.max_regression:.6g} worse")
    if rule.min_gain is not None:
        passed = low > rule.min_gain
        yield Check(passed, f"{told} is {'' if passed else 'not surely '}more than {rule.min_gain:.6g} better")


def _clean(name: str, training: Sequence[TrainingData]) -> Check:
    """Whether the data of every stage is without what overlaps with an evaluation set."""
    if unchecked := [one.stage for one in training if name not in one.against]:
        return Check(passed=False, reason=f"the data of {', '.join(unchecked)} was not compared with {name!r}")
    counts = ", ".join(f"{one.stage} {sum(one.left_out.values())}" for one in training)
    return Check(passed=True, reason=f"the training data is clean of {name!r}; overlapping records left out: {counts}")
