"""The gate passes a model only when every rule holds, and gives the reasons."""

import math

import pytest

from vila_ops.config import Gate
from vila_ops.config.eval import Rule
from vila_ops.eval.report import MetricRole, Report, ReportMetric
from vila_ops.registry.gate import GateMetric, judge, metrics_of

BETTER, WORSE = GateMetric(0.9), GateMetric(0.4)


def gate(*rules: Rule) -> Gate:
    """A gate of these rules."""
    return Gate(model_name="toy", rules=rules)


def report(*metrics: ReportMetric) -> Report:
    """A report with these metrics."""
    return Report(
        suite="s", split="test", model="m", data="d", benchmarks={}, metrics=metrics, layers=(), answers=()
    )  # fmt: skip


def metric(name: str, value: float, *, role: MetricRole = "model", lower_is_better: bool = False) -> ReportMetric:
    """One metric of a report."""
    return ReportMetric(
        name=name, measure=name, role=role, value=value, low=0.0, high=1.0, n=9, lower_is_better=lower_is_better,
        unit="share",
    )  # fmt: skip


def test_only_the_models_own_metrics_are_read() -> None:
    metrics = metrics_of(
        report(
            metric("pope", 0.75),
            metric("pope", 0.5, role="control"),
            metric("pope", 0.5, role="chance"),
            metric("loss", 2.5, lower_is_better=True),
        )
    )
    assert metrics == {"pope": GateMetric(0.75), "loss": GateMetric(2.5, lower_is_better=True)}


def test_a_metric_that_a_report_has_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match="'pope' twice"):
        metrics_of(report(metric("pope", 0.75), metric("pope", 0.7)))


@pytest.mark.parametrize(
    ("rule", "value", "passes"),
    [
        (Rule(metric="pope", at_least=0.7), 0.7, True),
        (Rule(metric="pope", at_least=0.7), 0.69, False),
        (Rule(metric="pope", at_most=0.7), 0.7, True),
        (Rule(metric="pope", at_most=0.7), 0.71, False),
        (Rule(metric="pope", at_least=0.7), math.nan, False),
        (Rule(metric="pope", at_most=0.7), math.nan, False),
        (Rule(metric="pope", max_regression=1.0), math.nan, False),
        (Rule(metric="pope", max_regression=0.0), 0.1, True),
    ],
)
def test_bounds_without_a_champion(rule: Rule, value: float, passes: bool) -> None:
    verdict = judge(gate(rule), {"pope": GateMetric(value)}, None)
    assert verdict.passed is passes
    assert len(verdict.reasons) == 1


@pytest.mark.parametrize(
    ("own", "champion", "lower_is_better", "passes"),
    [
        (0.75, 0.75, False, True),
        (0.70, 0.75, False, True),
        (0.60, 0.75, False, False),
        (0.60, 0.50, True, True),
        (0.50, 0.60, True, True),
        (0.75, 0.50, True, False),
        (0.75, math.nan, False, False),
    ],
)
def test_max_regression_looks_in_the_direction_of_the_metric(
    own: float, champion: float, lower_is_better: bool, passes: bool
) -> None:
    metrics = {"m": GateMetric(own, lower_is_better=lower_is_better)}
    champion_metrics = {"m": GateMetric(champion, lower_is_better=lower_is_better)}
    assert judge(gate(Rule(metric="m", max_regression=0.125)), metrics, champion_metrics).passed is passes


def test_one_rule_that_fails_is_enough_and_every_rule_gives_its_reason() -> None:
    rules = (Rule(metric="a", at_least=0.5, max_regression=0.1), Rule(metric="b", at_least=0.5))
    verdict = judge(gate(*rules), {"a": BETTER, "b": WORSE}, {"a": BETTER})
    assert not verdict.passed
    assert verdict.reasons == (
        "a 0.9 is at least 0.5",
        "a 0.9 is at most 0.1 worse than the champion's 0.9",
        "b 0.4 is not at least 0.5",
    )


def test_a_metric_that_the_report_lacks_is_an_error_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match=r"rules for \['pope'\], which the model's report lacks; it has \['a', 'b'\]"):
        judge(gate(Rule(metric="pope", at_least=0.5)), {"b": WORSE, "a": BETTER}, None)


def test_a_metric_that_only_the_champion_lacks_is_an_error_where_it_is_compared() -> None:
    with pytest.raises(ValueError, match=r"which the champion's report lacks; it has \[\]"):
        judge(gate(Rule(metric="a", max_regression=0.5)), {"a": BETTER}, {})
    assert judge(gate(Rule(metric="a", at_least=0.5)), {"a": BETTER}, {}).passed


def test_reports_that_disagree_on_the_direction_are_not_compared() -> None:
    with pytest.raises(ValueError, match="disagree"):
        judge(gate(Rule(metric="a", max_regression=0.5)), {"a": BETTER}, {"a": GateMetric(0.9, lower_is_better=True)})
