"""Two or more sealed reports compared: their common benchmarks, and the items on which the models disagree."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from vila_ops.artifacts.kinds import EvalReport
from vila_ops.config import Config
from vila_ops.errors import did_you_mean
from vila_ops.eval.compare import Comparison, Disagreement, Scores, ScoreTable, compare, disagreements
from vila_ops.eval.opened import OpenedBenchmark, opened
from vila_ops.eval.report import read_report
from vila_ops.tracking import flatten

OFFICIAL, CORRECTED = "_official", "_corrected"
"""What the names of the two columns of a metric have."""
Opened = Mapping[str, OpenedBenchmark]
"""The benchmarks of a report by the suite's names."""
SHOWN = 12
"""Items of a metric on which two models disagree that a comparison lists, the largest differences first."""
NO_MATTER = {"inputs.bootstrap_resamples", "inputs.settings.bootstrap_resamples"}
"""Settings of a result that change no score."""


class ComparedModel(Config):
    """A model of a comparison."""

    name: str
    """Its name in the comparison."""
    report: EvalReport
    split: str | None
    """Of the held-out data; None where all benchmarks are on official files."""


class ItemDisagreement(Disagreement):
    """An item that two models score differently, with what they answered."""

    benchmark: str
    metric: str
    model: str
    """Name of the candidate."""
    question: str
    """The texts of the item; empty where it has none, or where the metric is not one of single items."""
    expected: str
    baseline_answer: str | None
    """None where the answers are likelihoods, or the request failed."""
    candidate_answer: str | None


class ReportComparison(Config):
    """Reports compared, as the command prints them and pages show them."""

    models: tuple[ComparedModel, ...]
    """The baseline first."""
    comparison: Comparison
    notes: tuple[str, ...]
    """Settings in which results differ although they are compared, such as prompts; each with its benchmarks."""
    disagreements: tuple[ItemDisagreement, ...]
    """At most `SHOWN` of each metric and candidate, in the order of the metrics."""


def compare_reports(
    reports: Mapping[str, EvalReport], *, metrics: Sequence[str] = (), resamples: int = 10_000, seed: int = 0
) -> ReportComparison:
    """Compare the reports after the first with the first, by their names in the comparison.

    `metrics`: those of the reports that are compared; if empty all of the models' own, but `corrected` columns only
    where there is no `official` one. Raises ValueError for fewer than two reports and for a metric that none has,
    NotComparable where nothing can be compared, and what `opened` does.
    """
    _check_metrics(metrics, reports.values())
    by_model = {name: opened(report, metrics=metrics) for name, report in reports.items()}
    scores = {name: _scores(benchmarks, metrics) for name, benchmarks in by_model.items()}
    comparison = compare(scores, resamples=resamples, seed=seed)
    return ReportComparison(
        models=tuple(
            ComparedModel(name=name, report=report, split=read_report(report).split) for name, report in reports.items()
        ),
        comparison=comparison,
        notes=tuple(_notes(by_model, comparison)),
        disagreements=tuple(
            shown
            for one in comparison.metrics
            for shown in _disagreements(
                [by_model[name][one.benchmark] for name in (comparison.baseline, one.candidate)],
                [scores[name] for name in (comparison.baseline, one.candidate)],
                metric=one.metric,
                model=one.candidate,
            )
        ),
    )


def _scores(benchmarks: Opened, metrics: Sequence[str]) -> Scores:
    return {name: _chosen(one.scores(), metrics) for name, one in benchmarks.items()}


def _chosen(tables: Mapping[str, ScoreTable], metrics: Sequence[str]) -> dict[str, ScoreTable]:
    twins = {metric for metric in tables if CORRECTED in metric and metric.replace(CORRECTED, OFFICIAL) in tables}
    return {metric: table for metric, table in tables.items() if metric in (metrics or tables.keys() - twins)}


def _check_metrics(metrics: Sequence[str], reports: Iterable[EvalReport]) -> None:
    every = (metric for report in reports for metric in read_report(report).metrics)
    known = list(dict.fromkeys(metric.name for metric in every if metric.role == "model"))
    if unknown := [metric for metric in metrics if metric not in known]:
        raise ValueError(f"no report has the metric {unknown[0]!r}; they have {known}{did_you_mean(unknown[0], known)}")


def _notes(by_model: Mapping[str, Opened], comparison: Comparison) -> Iterator[str]:
    """The settings that differ between the baseline and a candidate, each with the compared benchmarks that have it."""
    benchmarks: dict[str, list[str]] = {}
    for benchmark, candidate in dict.fromkeys((one.benchmark, one.candidate) for one in comparison.metrics):
        ours, theirs = (_settings(by_model[name][benchmark]) for name in (comparison.baseline, candidate))
        for key in dict.fromkeys([*ours, *theirs]):
            if key not in NO_MATTER and ours.get(key) != theirs.get(key):
                differs = f"{ours.get(key)!r} for {comparison.baseline} and {theirs.get(key)!r} for {candidate}"
                benchmarks.setdefault(f"{key} is {differs}", []).append(benchmark)
    yield from (f"{', '.join(names)}: {difference}" for difference, names in benchmarks.items())


def _settings(one: OpenedBenchmark) -> dict[str, object]:
    return flatten({**one.config.model_dump(mode="json"), "inputs": dict(one.inputs)})


def _disagreements(
    sides: Sequence[OpenedBenchmark], scores: Sequence[Scores], *, metric: str, model: str
) -> Iterator[ItemDisagreement]:
    """The largest disagreements of a candidate and the baseline, which comes first, by one metric."""
    name = sides[0].name
    items = {item.id: item for item in sides[0].items}
    answers = [
        {row.item: row.answer for row in reversed(side.rows) if row.condition == "matched"} for side in sides
    ]  # the first row of an item
    for one in disagreements(*(tables[name][metric] for tables in scores))[:SHOWN]:
        item = items.get(one.item)
        texts = [part for parts in item.parts.values() for part in parts if isinstance(part, str)] if item else []
        yield ItemDisagreement(
            **dict(one),
            benchmark=name,
            metric=metric,
            model=model,
            question="\n".join(texts),
            expected=item.answer if item else "",
            baseline_answer=answers[0].get(one.item),
            candidate_answer=answers[1].get(one.item),
        )
