"""Sealed reports are compared item by item, from the store alone, and what differs otherwise is named."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.eval.benchmarks.sample import config_of
from tests.eval.charts import METRIC, checkpoint_of, sealed_report, suite_of, write_charts
from vila_ops.artifacts.kinds import EvalReport
from vila_ops.config import OfficialSuite, Resources
from vila_ops.config.benchmarks import ChartQa
from vila_ops.eval.benchmarks import chartqa
from vila_ops.eval.compare import NotComparable
from vila_ops.eval.compare_reports import SHOWN, ReportComparison, compare_reports
from vila_ops.eval.opened import open_benchmark
from vila_ops.eval.report import read_report

CHARTS = 12
OLD = {f"human-{chart}" for chart in range(8)}
NEW = {f"human-{chart}" for chart in range(1, 10)} | {f"augmented-{chart}" for chart in range(4)}


@pytest.fixture(scope="module")
def resources(tmp_path_factory: pytest.TempPathFactory) -> Resources:
    folder = tmp_path_factory.mktemp("charts")
    where = {"storage.store": str(folder / "store"), "storage.cache": str(folder / "cache")}
    files = {"storage.benchmarks": str(write_charts(folder / "files", CHARTS))}
    return Resources(launch="inline").with_changes({**where, **files})


@pytest.fixture(scope="module")
def old(resources: Resources) -> EvalReport:
    return sealed_report(resources, checkpoint_of("old"), OLD)


@pytest.fixture(scope="module")
def new(resources: Resources) -> EvalReport:
    return sealed_report(resources, checkpoint_of("new"), NEW)


@pytest.fixture(scope="module")
def compared(old: EvalReport, new: EvalReport) -> ReportComparison:
    return compare_reports({"before": old, "after": new}, metrics=(METRIC,))


def test_two_reports_by_hand(compared: ReportComparison) -> None:
    [metric] = compared.comparison.metrics
    overall = metric.overall
    assert (metric.benchmark, metric.metric, metric.candidate) == ("charts", METRIC, "after")
    assert (overall.n, overall.groups, overall.baseline, overall.candidate) == (24, 12, 8 / 24, 13 / 24)
    assert overall.value == pytest.approx(5 / 24)
    human, augmented = metric.slices["human"], metric.slices["augmented"]
    assert (human.n, human.baseline, human.candidate) == (12, 8 / 12, 9 / 12)
    assert (augmented.n, augmented.baseline, augmented.candidate) == (12, 0, 4 / 12)
    # Right answers that each chart gains: chart 0 loses one and gains one, 1 to 3 gain one, 8 and 9 gain one.
    gains = [1, 1, 1, 1, 1]
    sums = [
        abs(sum(sign * gain for sign, gain in zip(signs, gains, strict=True))) for signs in product((1, -1), repeat=5)
    ]
    assert metric.p == pytest.approx(sum(one > 5 for one in sums) / 32 + sum(one == 5 for one in sums) / 64)
    assert metric.p_holm == metric.p
    assert metric.disagreements == 1 + 2 + 4


def test_disagreements_have_what_was_asked_and_answered(compared: ReportComparison) -> None:
    shown = {one.item: one for one in compared.disagreements}
    assert shown.keys() == (OLD ^ NEW)
    lost = shown["human-0"]
    assert (lost.question, lost.expected, lost.group) == ("human question 0?", "yes", "0.png")
    assert (lost.baseline_answer, lost.candidate_answer, lost.baseline, lost.candidate) == ("yes", "no", (1,), (0,))
    assert (lost.benchmark, lost.metric, lost.model) == ("charts", METRIC, "after")


def test_at_most_so_many_disagreements_of_a_metric_are_listed(resources: Resources, old: EvalReport) -> None:
    every = {f"{part}-{chart}" for part in ("human", "augmented") for chart in range(CHARTS)}
    best = sealed_report(resources, checkpoint_of("best"), every)
    compared = compare_reports({"before": old, "after": best}, metrics=(METRIC,))
    assert compared.comparison.metrics[0].disagreements == 24 - 8
    assert len(compared.disagreements) == SHOWN


def test_opened_scores_are_the_numbers_of_the_report(new: EvalReport) -> None:
    benchmark = open_benchmark(new, "charts")
    told = {one.name: one.value for one in read_report(new).metrics}
    assert {name: table.values.mean() for name, table in benchmark.scores().items()} == pytest.approx(told)
    (image,) = benchmark.images_of(benchmark.items[0])
    assert image.startswith(b"\x89PNG")


def test_official_columns_are_compared_and_metrics_that_are_chosen_are_one_family(
    old: EvalReport, new: EvalReport
) -> None:
    reports = {"before": old, "after": new}
    assert [one.metric for one in compare_reports(reports).comparison.metrics] == [METRIC]
    official, corrected = compare_reports(reports, metrics=(METRIC, "charts_corrected")).comparison.metrics
    assert [official.metric, corrected.metric] == [METRIC, "charts_corrected"]
    assert official.p == corrected.p
    assert official.p_holm == corrected.p_holm == pytest.approx(2 * official.p)


def test_another_version_of_the_questions_is_refused(resources: Resources, old: EvalReport, tmp_path: Path) -> None:
    fewer = resources.with_changes({"storage.benchmarks": str(write_charts(tmp_path / "fewer", CHARTS - 1))})
    with pytest.raises(
        NotComparable, match="charts_official of after: the two differ in 2 items, one is 'augmented-11'"
    ):
        compare_reports({"before": old, "after": sealed_report(fewer, checkpoint_of("new"), NEW)})
    relabelled = write_charts(tmp_path / "relabelled", CHARTS, **{"human-3": "maybe"})
    other = resources.with_changes({"storage.benchmarks": str(relabelled)})
    with pytest.raises(NotComparable, match="1 items are scored by other references, one is 'human-3'"):
        compare_reports({"before": old, "after": sealed_report(other, checkpoint_of("new"), NEW)})


def test_a_policy_of_failed_items_is_another_metric(resources: Resources, old: EvalReport) -> None:
    answered = sealed_report(resources, checkpoint_of("new"), NEW, suite_of(failed_items="left_out"))
    with pytest.raises(NotComparable, match="charts_official of after: the candidate has no such metric"):
        compare_reports({"before": old, "after": answered})


def test_another_prompt_is_compared_and_named(resources: Resources, old: EvalReport) -> None:
    prompt = {"user": "{image}\n{question}", "answer": {"kind": "generate", "max_new_tokens": 32}}
    short = sealed_report(resources, checkpoint_of("short"), OLD, suite_of(prompt=prompt))
    compared = compare_reports({"hint": old, "short": short}, metrics=(METRIC,))
    assert compared.comparison.metrics[0].overall.value == 0
    assert [note.partition(" is ")[0] for note in compared.notes] == ["charts: prompt.user", "charts: prompt.hint"]
    assert compared.notes[1].endswith("'' for short")


def test_what_differs_in_several_benchmarks_is_said_once(resources: Resources) -> None:
    prompt = {"user": "{image}\n{question}", "answer": {"kind": "generate", "max_new_tokens": 32}}
    cases: dict[str, dict[str, Any]] = {"hint": {}, "short": {"prompt": prompt}}
    reports = {}
    for name, changes in cases.items():
        both = {"charts": config_of(ChartQa, **changes), "some": config_of(ChartQa, first=8, **changes)}
        suite = OfficialSuite(name="both", benchmarks=both, bootstrap_resamples=50)
        reports[name] = sealed_report(resources, checkpoint_of(f"{name}-both"), OLD, suite)
    notes = compare_reports(reports).notes
    assert [note.partition(" is ")[0] for note in notes] == ["charts, some: prompt.user", "charts, some: prompt.hint"]


def test_an_unknown_metric_is_told_with_the_nearest_one(old: EvalReport, new: EvalReport) -> None:
    with pytest.raises(ValueError, match=r"no report has the metric 'charts_offical'.*did you mean 'charts_official'"):
        compare_reports({"before": old, "after": new}, metrics=("charts_offical",))


def test_what_an_earlier_version_scored_is_refused(
    old: EvalReport, new: EvalReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chartqa, "REVISION", chartqa.REVISION + 1)
    with pytest.raises(ValueError, match=r"charts of .* was scored by another version of vila-ops; evaluate the model"):
        compare_reports({"before": old, "after": new})
