"""The gate passes a model only when every rule holds, and names what decides."""

import math
from typing import Any

import pytest
from pydantic import ValidationError

from vila_ops.config import Gate
from vila_ops.config.eval import Rule
from vila_ops.eval.compare import Comparison, Difference, LeftOut, MetricComparison
from vila_ops.eval.report import MetricRole, Report, ReportMetric
from vila_ops.registry.gate import TrainingData, judge, metrics_of


def gate(*rules: Rule, **more: Any) -> Gate:
    """A gate of these rules."""
    return Gate(model_name="toy", rules=rules, **more)


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


def difference(low: float, high: float) -> Difference:
    middle = (low + high) / 2
    return Difference(n=40, groups=24, baseline=0.5, candidate=0.5 + middle, value=middle, low=low, high=high)


def compared(name: str, low: float, high: float, *, lower_is_better: bool = False, **slices: Any) -> MetricComparison:
    """The model against the champion's 0.5, with this interval of the difference; a slice may have a reason instead."""
    intervals = {key: difference(*one) for key, one in slices.items() if not isinstance(one, str)}
    return MetricComparison(
        benchmark=name, metric=name, candidate="model", lower_is_better=lower_is_better, unit="share",
        overall=difference(low, high), test="sign_flip_mid_p", p=0.5, p_holm=1.0, detectable=0.1, disagreements=3,
        slices=intervals, skipped_slices={key: one for key, one in slices.items() if isinstance(one, str)},
    )  # fmt: skip


def comparison(*metrics: MetricComparison, left_out: tuple[LeftOut, ...] = ()) -> Comparison:
    return Comparison(
        baseline="champion", candidates=("model",), metrics=metrics, left_out=left_out, resamples=9, seed=0
    )


def test_only_the_models_own_metrics_are_read() -> None:
    metrics = metrics_of(
        report(
            metric("pope", 0.75),
            metric("pope", 0.5, role="control"),
            metric("pope", 0.5, role="chance"),
            metric("loss", 2.5, lower_is_better=True),
        )
    )
    assert metrics == {"pope": 0.75, "loss": 2.5}


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
        (Rule(metric="pope", min_gain=0.0), 0.1, True),
    ],
)
def test_bounds_without_a_champion(rule: Rule, value: float, passes: bool) -> None:
    verdict = judge(gate(rule), {"pope": value}, None, ())
    assert verdict.passed is passes
    assert len(verdict.checks) == 1


@pytest.mark.parametrize(
    ("low", "high", "lower_is_better", "passes"),
    [
        (-0.125, 0.3, False, True),
        (-0.126, 0.3, False, False),
        (0.1, 0.2, False, True),
        (-0.3, 0.125, True, True),
        (-0.3, 0.126, True, False),
        (-0.3, -0.2, True, True),
    ],
)
def test_the_end_of_the_interval_may_not_be_worse_than_the_margin(
    low: float, high: float, lower_is_better: bool, passes: bool
) -> None:
    against = comparison(compared("m", low, high, lower_is_better=lower_is_better))
    assert judge(gate(Rule(metric="m", max_regression=0.125)), {"m": 0.6}, against, ()).passed is passes


@pytest.mark.parametrize(
    ("low", "high", "lower_is_better", "gain", "passes"),
    [
        (0.01, 0.2, False, 0.0, True),
        (0.0, 0.2, False, 0.0, False),  # equal models are not ruled out
        (0.01, 0.2, False, 0.05, False),
        (-0.2, -0.01, True, 0.0, True),
        (-0.2, 0.01, True, 0.0, False),
        (0.01, 0.2, True, 0.0, False),
    ],
)
def test_a_model_wins_where_the_whole_interval_is_better(
    low: float, high: float, lower_is_better: bool, gain: float, passes: bool
) -> None:
    against = comparison(compared("m", low, high, lower_is_better=lower_is_better))
    assert judge(gate(Rule(metric="m", min_gain=gain)), {"m": 0.6}, against, ()).passed is passes


def test_the_verdict_names_the_rules_that_decide_with_numbers() -> None:
    rules = (Rule(metric="a", at_least=0.5, max_regression=0.1, min_gain=0.05), Rule(metric="b", at_least=0.5))
    against = comparison(compared("a", 0.0, 0.25))
    verdict = judge(gate(*rules), {"a": 0.625, "b": 0.4}, against, ())
    numbers = "a 0.625, champion 0.5: gain +0.125 (95 % interval +0 to +0.25, 40 items, 24 groups)"
    assert [check.reason for check in verdict.checks] == [
        "a 0.625 is at least 0.5",
        f"{numbers} is not more than 0.1 worse",
        f"{numbers} is not surely more than 0.05 better",
        "b 0.4 is not at least 0.5",
    ]
    assert not verdict.passed
    assert verdict.reason == f"{numbers} is not surely more than 0.05 better; b 0.4 is not at least 0.5"
    passed = judge(gate(rules[1]), {"b": 0.9}, None, ())
    assert (passed.passed, passed.reason) == (True, "b 0.9 is at least 0.5")


def test_every_slice_has_to_hold_by_its_own_interval() -> None:
    against = comparison(compared("m", 0.0, 0.1, few="2 items in 1 clusters", good=(0.0, 0.2), bad=(-0.3, 0.2)))

    def failing(*slices: str, every: bool = False) -> list[str]:
        rule = Rule(metric="m", max_regression=0.1, slices="all" if every else slices)
        checks = judge(gate(rule), {"m": 0.55}, against, ()).checks
        assert len(checks) == 1 + (3 if every else len(slices))
        return [check.reason for check in checks if not check.passed]

    assert failing("good") == []
    assert failing("good", "bad") == failing("bad")
    (bad,) = failing("bad")
    assert bad.startswith("m on 'bad' 0.45, champion 0.5: gain -0.05 (95 % interval -0.3 to +0.2")
    assert failing("few") == ["m on 'few' has no interval: 2 items in 1 clusters"]
    assert failing(every=True) == [*failing("bad"), *failing("few")]
    with pytest.raises(ValueError, match=r"m has no slice 'god'; it has \['bad', 'few', 'good'\]; did you mean 'good'"):
        failing("god")


def test_a_metric_that_the_report_lacks_is_an_error_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match=r"rules for \['pope'\], which the model's report lacks; it has \['a', 'b'\]"):
        judge(gate(Rule(metric="pope", at_least=0.5)), {"b": 0.4, "a": 0.9}, None, ())


def test_what_cannot_be_compared_is_an_error_with_the_reason_where_a_rule_needs_it() -> None:
    left_out = LeftOut(benchmark="a", metric="a", candidate="model", reason="the two differ in 3 items")
    against = comparison(compared("b", 0.0, 0.1), left_out=(left_out,))
    with pytest.raises(ValueError, match=r"rule on 'a', by which .* with the champion: the two differ in 3 items"):
        judge(gate(Rule(metric="a", max_regression=0.5)), {"a": 0.9}, against, ())
    assert judge(gate(Rule(metric="a", at_least=0.5)), {"a": 0.9}, against, ()).passed


def test_the_data_of_every_stage_has_to_be_clean_of_each_evaluation_set() -> None:
    pretrain = TrainingData("pretrain", {"contaminated_image": 2, "contaminated_text": 1}, ("gqa", "pope"))
    sft = TrainingData("sft", {}, ("gqa",))
    clean = gate(Rule(metric="m", at_least=0), clean_of=("gqa",))
    verdict = judge(clean, {"m": 1}, None, (pretrain, sft))
    assert verdict.passed
    assert verdict.checks[-1].reason == (
        "the training data is clean of 'gqa'; overlapping records left out: pretrain 3, sft 0"
    )
    both = gate(Rule(metric="m", at_least=0), clean_of=("gqa", "pope"))
    verdict = judge(both, {"m": 1}, None, (pretrain, sft))
    assert not verdict.passed
    assert verdict.reason == "the data of sft was not compared with 'pope'"


def test_slices_without_a_comparison_are_refused() -> None:
    with pytest.raises(ValidationError, match="rule on 'm' has slices, on which only max_regression and min_gain"):
        Rule(metric="m", at_least=0.5, slices="all")
    with pytest.raises(ValidationError, match="has no bound; set at_least, at_most, max_regression or min_gain"):
        Rule(metric="m")
