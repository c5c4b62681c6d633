"""Compare two or more models on the same items: differences with intervals, tests, slices, disagreements. Pure.

The first model is the baseline, every other one is a candidate, and a difference is candidate minus baseline. Groups of
items, such as the questions of one image, are kept together: the intervals draw whole groups (`statistics`), and the
tests exchange them (`significance`). Holm's method keeps the chance of any false difference among all metrics at 5 %.

N items, K columns of a metric.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vila_ops.config import Config
from vila_ops.eval.significance import TestName, holm, minimum_detectable_effect, paired_test
from vila_ops.eval.statistics import (
    FloatArray,
    Statistic,
    UndefinedStatistic,
    cluster_sums,
    paired_difference,
)


@dataclass(frozen=True)
class MetricScores:
    """The scores of all items by one metric, and how its value is made of them."""

    values: FloatArray
    """(N,), or (N, K) for a statistic of several columns; finite. What a failed item scores is decided before."""
    statistic: Statistic = "mean"
    lower_is_better: bool = False


@dataclass(frozen=True)
class ScoreTable:
    """What one model scored on the items of one benchmark."""

    items: tuple[str, ...]
    """(N,), distinct. Models are compared item by item under these names, in whatever order."""
    groups: tuple[str, ...]
    """(N,); items of one group, such as the questions of one image, are not independent."""
    slices: tuple[tuple[str, ...], ...]
    """(N,); the slices that hold each item, such as `category: scenes`. An item may be in several or in none."""
    metrics: Mapping[str, MetricScores]
    """By name. Whatever else a number depends on (variant, judge, policy of failed items) is part of the name."""

    def __post_init__(self) -> None:
        """Raises ValueError for columns of unequal length, an item given twice and a score that is not finite."""
        count = len(self.items)
        if len(self.groups) != count or len(self.slices) != count:
            raise ValueError(
                f"{count} items, {len(self.groups)} groups and {len(self.slices)} rows of slices; give each item one"
            )
        item, times = Counter(self.items).most_common(1)[0] if count else ("", 1)
        if times > 1:
            raise ValueError(f"item {item!r} is given {times} times; keep one result of each item")
        for name, metric in self.metrics.items():
            if len(metric.values) != count:
                raise ValueError(
                    f"metric {name!r} has {len(metric.values)} scores for {count} items; give one for each"
                )
            columns = tuple(range(1, metric.values.ndim))
            if len(bad := np.flatnonzero(~np.isfinite(metric.values).all(axis=columns))):
                raise ValueError(
                    f"metric {name!r} has no finite score for {len(bad)} items, the first is {self.items[bad[0]]!r}; "
                    "count failed items as wrong, or leave them out for every model"
                )


class Difference(Config):
    """One metric of a candidate and of the baseline on the same items, in the metric's unit."""

    n: int
    """Number of items."""
    groups: int
    """Number of distinct groups, on which the width of the interval depends."""
    baseline: float
    candidate: float
    value: float
    """candidate - baseline."""
    low: float
    """Start of the 95 % interval of the difference, which is not widened for other metrics and slices."""
    high: float


class PairComparison(Config):
    """Two models by one metric of one benchmark."""

    lower_is_better: bool
    overall: Difference
    test: TestName
    p: float
    """Two-sided, for this test alone."""
    detectable: float
    """The true difference that such a test finds at 5 % in 80 % of the cases, by the spread of these scores; it needs
    to be larger to be found after Holm's adjustment. 0 for models that score every item the same."""
    disagreements: int
    """Number of items with different scores; `disagreements` lists them."""
    slices: dict[str, Difference]
    """By name, in alphabetical order. They show where models differ and are no tests of the family."""
    skipped_slices: dict[str, str]
    """Slices without an interval, such as those of a single group, with the reason."""


class MetricComparison(PairComparison):
    """A candidate against the baseline by one metric, as one test of a family."""

    benchmark: str
    metric: str
    candidate: str
    p_holm: float
    """Adjusted for all tests of the comparison."""


class Comparison(Config):
    """Candidates against a baseline on the same benchmarks."""

    baseline: str
    candidates: tuple[str, ...]
    metrics: tuple[MetricComparison, ...]
    """By benchmark, then metric, then candidate, each in the given order."""
    resamples: int
    seed: int


class Disagreement(Config):
    """An item that two models score differently."""

    item: str
    group: str
    baseline: tuple[float, ...]
    """The columns of its score, (K,)."""
    candidate: tuple[float, ...]


def compare(models: Mapping[str, Mapping[str, ScoreTable]], *, resamples: int = 10_000, seed: int = 0) -> Comparison:
    """Compare every model after the first with the first. `models` has the tables of each model by benchmark.

    Every metric is one test of the family, so give those that were chosen before the scores were known.
    Raises ValueError for fewer than two models and for models that differ in benchmarks, items, groups, slices or
    metrics, and UndefinedStatistic for a metric that has no interval over all items, such as one of a single group.
    """
    if len(models) < 2:
        raise ValueError(f"{len(models)} models are given ({', '.join(models)}); a comparison needs at least two")
    baseline, *candidates = models
    for candidate in candidates:
        if missing := models[baseline].keys() ^ models[candidate].keys():
            raise ValueError(f"only one of {baseline!r} and {candidate!r} has {sorted(missing)}; evaluate both on them")
    names: list[tuple[str, str, str]] = []
    pairs: list[PairComparison] = []
    for benchmark, table in models[baseline].items():
        others = {name: _aligned(table, models[name][benchmark], f"{benchmark} of {name!r}") for name in candidates}
        for metric in table.metrics:
            for candidate, other in others.items():
                names.append((benchmark, metric, candidate))
                try:
                    pairs.append(_compare_pair(table, other, metric, resamples=resamples, seed=seed))
                except UndefinedStatistic as error:
                    raise UndefinedStatistic(f"{metric} of {benchmark}: {error}") from error
    adjusted = holm([pair.p for pair in pairs])
    return Comparison(
        baseline=baseline,
        candidates=tuple(candidates),
        metrics=tuple(
            MetricComparison(**dict(pair), benchmark=benchmark, metric=metric, candidate=candidate, p_holm=p)
            for (benchmark, metric, candidate), pair, p in zip(names, pairs, adjusted, strict=True)
        ),
        resamples=resamples,
        seed=seed,
    )


def disagreements(baseline: ScoreTable, candidate: ScoreTable, metric: str) -> tuple[Disagreement, ...]:
    """The items that two models score differently, the largest difference first, then in the baseline's order.

    Raises ValueError for tables of different items, groups, slices or metrics.
    """
    candidate = _aligned(baseline, candidate, "the candidate")
    scores = baseline.metrics[metric], candidate.metrics[metric]
    gaps = _gaps(*scores)
    rows = [int(row) for row in np.argsort(-gaps, kind="stable") if gaps[row] > 0]
    first, second = (one.values.reshape(len(gaps), -1) for one in scores)
    return tuple(
        Disagreement(
            item=baseline.items[row],
            group=baseline.groups[row],
            baseline=tuple(first[row].tolist()),
            candidate=tuple(second[row].tolist()),
        )
        for row in rows
    )


@dataclass(frozen=True)
class _Pair:
    """The scores of two models on the same items, in the same order."""

    baseline: FloatArray
    candidate: FloatArray
    groups: NDArray[np.intp]
    """(N,), a number for each group."""
    statistic: Statistic

    def at(self, rows: NDArray[np.intp]) -> "_Pair":
        return _Pair(self.baseline[rows], self.candidate[rows], self.groups[rows], self.statistic)


def _compare_pair(
    baseline: ScoreTable, candidate: ScoreTable, metric: str, *, resamples: int, seed: int
) -> PairComparison:
    first, second = baseline.metrics[metric], candidate.metrics[metric]
    _, groups = np.unique(np.array(baseline.groups), return_inverse=True)
    pair = _Pair(first.values, second.values, groups, first.statistic)
    overall, standard_error = _difference(pair, resamples=resamples, seed=seed)
    test = paired_test(second.values, first.values, groups, statistic=first.statistic, resamples=resamples, seed=seed)
    slices, skipped = _slices(baseline, pair, resamples=resamples, seed=seed)
    return PairComparison(
        lower_is_better=first.lower_is_better,
        overall=overall,
        test=test.name,
        p=test.p,
        detectable=minimum_detectable_effect(standard_error, overall.groups),
        disagreements=int(np.count_nonzero(_gaps(first, second))),
        slices=slices,
        skipped_slices=skipped,
    )


def _slices(
    table: ScoreTable, pair: _Pair, *, resamples: int, seed: int
) -> tuple[dict[str, Difference], dict[str, str]]:
    """The difference in each slice, and why a slice has none."""
    rows: dict[str, list[int]] = {}
    for row, names in enumerate(table.slices):
        for name in names:
            rows.setdefault(name, []).append(row)
    slices, skipped = {}, {}
    for name in sorted(rows):
        try:
            slices[name], _ = _difference(pair.at(np.array(rows[name])), resamples=resamples, seed=seed)
        except UndefinedStatistic as error:
            skipped[name] = str(error)
    return slices, skipped


def _difference(pair: _Pair, *, resamples: int, seed: int) -> tuple[Difference, float]:
    """The difference and its standard error. Raises UndefinedStatistic."""
    interval = paired_difference(
        pair.candidate, pair.baseline, pair.groups, statistic=pair.statistic, resamples=resamples, seed=seed
    )
    baseline, candidate = (
        float(function(sums.sum(axis=0, keepdims=True))[0])
        for sums, function in (
            cluster_sums(values, pair.groups, pair.statistic) for values in (pair.baseline, pair.candidate)
        )
    )
    difference = Difference(
        n=interval.n,
        groups=interval.clusters,
        baseline=baseline,
        candidate=candidate,
        value=interval.value,
        low=interval.low,
        high=interval.high,
    )
    return difference, interval.standard_error


def _gaps(first: MetricScores, second: MetricScores) -> FloatArray:
    """The largest difference of a column for each item, (N,)."""
    gaps = np.abs(second.values - first.values)
    largest: FloatArray = gaps.max(axis=tuple(range(1, gaps.ndim)))
    return largest


def _aligned(baseline: ScoreTable, other: ScoreTable, name: str) -> ScoreTable:
    """The other table in the baseline's order of items. Raises ValueError if they do not measure the same."""
    if missing := set(baseline.items) ^ set(other.items):
        raise ValueError(
            f"{name} and the baseline differ in {len(missing)} items, one is {min(missing)!r}; a comparison needs the "
            "same items: evaluate both on one version of the benchmark, with one policy of failed items"
        )
    row_of = {item: row for row, item in enumerate(other.items)}
    order = [row_of[item] for item in baseline.items]
    groups, slices = tuple(other.groups[row] for row in order), tuple(other.slices[row] for row in order)
    for row, item in enumerate(baseline.items):
        if (groups[row], slices[row]) != (baseline.groups[row], baseline.slices[row]):
            raise ValueError(
                f"item {item!r} is of group {groups[row]!r} and slices {slices[row]} in {name}, but of "
                f"{baseline.groups[row]!r} and {baseline.slices[row]} in the baseline; score both by one version of it"
            )
    for metric in baseline.metrics.keys() | other.metrics.keys():
        if _kind(baseline.metrics.get(metric)) != _kind(other.metrics.get(metric)):
            raise ValueError(
                f"{name} and the baseline have no common metric {metric!r}, with one statistic, number of columns and "
                "direction; score both by one version of the benchmark"
            )
    metrics = {
        metric: MetricScores(scores.values[order], scores.statistic, scores.lower_is_better)
        for metric, scores in other.metrics.items()
    }
    return ScoreTable(items=baseline.items, groups=groups, slices=slices, metrics=metrics)


def _kind(metric: MetricScores | None) -> object:
    """What must be the same for two columns of scores to be compared."""
    return metric and (metric.statistic, metric.lower_is_better, metric.values.shape[1:])
