"""Compare two or more models on the same items: differences with intervals, tests, slices, disagreements. Pure.

The first model is the baseline, every other one is a candidate, and a difference is candidate minus baseline. Groups of
items, such as the questions of one image, are kept together: the intervals draw whole groups (`statistics`), and the
tests exchange them (`significance`). Holm's method keeps the chance of any false difference among all metrics at 5 %.

N items, K columns of a metric.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vila_ops.config import Config
from vila_ops.eval.significance import LEVEL, TestName, holm, minimum_detectable_effect, paired_test
from vila_ops.eval.statistics import (
    PER_TOKEN,
    FloatArray,
    Statistic,
    UndefinedStatistic,
    cluster_sums,
    paired_difference,
)


class NotComparable(ValueError):
    """Two models were not measured in the same way on the same items."""


@dataclass(frozen=True)
class ScoreTable:
    """What one model scored by one metric, and how its value is made of the scores."""

    items: tuple[str, ...]
    """(N,), distinct. Models are compared item by item under these names, in whatever order."""
    groups: tuple[str, ...]
    """(N,); items of one group, such as the questions of one image, are not independent."""
    slices: tuple[tuple[str, ...], ...]
    """(N,); the slices that hold each item, such as `category: scenes`. An item may be in several or in none."""
    values: FloatArray
    """(N,), or (N, K) for a statistic of several columns; finite. What a failed item scores is decided before."""
    statistic: Statistic = "mean"
    lower_is_better: bool = False
    unit: str = "share"
    references: Mapping[str, str] = field(default_factory=dict)
    """A hash of what each item of the benchmark is scored by; models are compared where all are the same."""

    def __post_init__(self) -> None:
        """Raises ValueError for columns of unequal length, an item given twice and a score that is not finite."""
        count = len(self.items)
        if not len(self.groups) == len(self.slices) == len(self.values) == count:
            raise ValueError(
                f"{count} items, {len(self.groups)} groups, {len(self.slices)} rows of slices and {len(self.values)} "
                "scores; give each item one"
            )
        item, times = Counter(self.items).most_common(1)[0] if count else ("", 1)
        if times > 1:
            raise ValueError(f"item {item!r} is given {times} times; keep one result of each item")
        columns = tuple(range(1, self.values.ndim))
        if len(bad := np.flatnonzero(~np.isfinite(self.values).all(axis=columns))):
            raise ValueError(
                f"{len(bad)} items have no finite score, the first is {self.items[bad[0]]!r}; count failed items as "
                "wrong, or leave them out for every model"
            )


Scores = Mapping[str, Mapping[str, ScoreTable]]
"""What one model scored, by benchmark and metric. Whatever else a number depends on (variant, judge, policy of failed
items) is part of the metric's name."""


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
    unit: str
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

    @property
    def verdict(self) -> Literal["better", "worse", "equal", "open"]:
        """Of the candidate: `equal` where every item is scored the same, `open` where Holm's p is above 5 %."""
        if self.disagreements == 0:
            return "equal"
        if self.p_holm > LEVEL or self.overall.value == 0:
            return "open"
        return "better" if (self.overall.value > 0) != self.lower_is_better else "worse"


class LeftOut(Config):
    """What is not compared."""

    benchmark: str
    metric: str | None
    """None: the benchmark was measured on one of the models alone."""
    candidate: str
    reason: str


class Comparison(Config):
    """Candidates against a baseline on the same benchmarks."""

    baseline: str
    candidates: tuple[str, ...]
    metrics: tuple[MetricComparison, ...]
    """By benchmark, then metric, then candidate, each in the given order."""
    left_out: tuple[LeftOut, ...]
    resamples: int
    seed: int


class Disagreement(Config):
    """An item that two models score differently."""

    item: str
    group: str
    baseline: tuple[float, ...]
    """The columns of its score, (K,)."""
    candidate: tuple[float, ...]


def compare(models: Mapping[str, Scores], *, resamples: int = 10_000, seed: int = 0) -> Comparison:
    """Compare every model after the first with the first; `models` has the scores of each by its name.

    Every metric is one test of the family, so give those that were chosen before the scores were known. A metric that
    was not measured in the same way on the same items, or has no interval over them, is left out with the reason.
    Raises ValueError for fewer than two models, and NotComparable where nothing is left.
    """
    if len(models) < 2:
        raise ValueError(f"{len(models)} models are given ({', '.join(models)}); a comparison needs at least two")
    baseline, *candidates = models
    compared: dict[tuple[str, str, str], PairComparison] = {}
    left_out: dict[LeftOut, None] = {}
    for benchmark, metric in _names(models):
        for candidate in candidates:
            sides = models[baseline].get(benchmark), models[candidate].get(benchmark)
            try:
                tables = _tables(*sides, metric)
                if tables is not None:
                    pair = _compare_pair(*tables, resamples=resamples, seed=seed)
                    compared[benchmark, metric, candidate] = pair
            except (NotComparable, UndefinedStatistic) as error:
                of = None if None in sides else metric
                left_out[LeftOut(benchmark=benchmark, metric=of, candidate=candidate, reason=str(error))] = None
    if not compared:
        reasons = [f"{one.metric or one.benchmark} of {one.candidate}: {one.reason}" for one in left_out]
        raise NotComparable(f"{baseline} and {', '.join(candidates)} have nothing in common: {'; '.join(reasons[:3])}")
    adjusted = holm([pair.p for pair in compared.values()])
    return Comparison(
        baseline=baseline,
        candidates=tuple(candidates),
        metrics=tuple(
            MetricComparison(**dict(pair), benchmark=benchmark, metric=metric, candidate=candidate, p_holm=p)
            for ((benchmark, metric, candidate), pair), p in zip(compared.items(), adjusted, strict=True)
        ),
        left_out=tuple(left_out),
        resamples=resamples,
        seed=seed,
    )


def disagreements(baseline: ScoreTable, candidate: ScoreTable) -> tuple[Disagreement, ...]:
    """The items that two models score differently, the largest difference first, then in the baseline's order.

    Raises NotComparable for tables that do not measure the same.
    """
    candidate = aligned(baseline, candidate)
    gaps = _gaps(baseline, candidate)
    rows = [int(row) for row in np.argsort(-gaps, kind="stable") if gaps[row] > 0]
    first, second = (one.values.reshape(len(gaps), -1) for one in (baseline, candidate))
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


def _names(models: Mapping[str, Scores]) -> dict[tuple[str, str], None]:
    """Benchmark and metric of every score, those of the first model first."""
    every = (scores.items() for scores in models.values())
    return dict.fromkeys((benchmark, metric) for scores in every for benchmark, tables in scores for metric in tables)


def _tables(
    baseline: Mapping[str, ScoreTable] | None, candidate: Mapping[str, ScoreTable] | None, metric: str
) -> tuple[ScoreTable, ScoreTable] | None:
    """The scores by a metric in one order of items; None where neither of the two models has it.

    Raises NotComparable.
    """
    if baseline is None and candidate is None:
        return None
    if baseline is None or candidate is None:
        raise NotComparable(f"the {'baseline' if baseline is None else 'candidate'} was not measured on it")
    first, second = baseline.get(metric), candidate.get(metric)
    if first is None and second is None:
        return None
    if first is None or second is None:
        raise NotComparable(
            f"the {'baseline' if first is None else 'candidate'} has no such metric; a variant, a judge, the policy of "
            "failed items and the version of the benchmark make another one"
        )
    return first, aligned(first, second)


def _compare_pair(first: ScoreTable, second: ScoreTable, *, resamples: int, seed: int) -> PairComparison:
    _, groups = np.unique(np.array(first.groups), return_inverse=True)
    pair = _Pair(first.values, second.values, groups, first.statistic)
    overall, standard_error = _difference(pair, resamples=resamples, seed=seed)
    test = paired_test(second.values, first.values, groups, statistic=first.statistic, resamples=resamples, seed=seed)
    slices, skipped = _slices(first, pair, resamples=resamples, seed=seed)
    return PairComparison(
        lower_is_better=first.lower_is_better,
        unit=first.unit,
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


def _gaps(first: ScoreTable, second: ScoreTable) -> FloatArray:
    """The largest difference of a column for each item, (N,)."""
    gaps = np.abs(second.values - first.values)
    largest: FloatArray = gaps.max(axis=tuple(range(1, gaps.ndim)))
    return largest


def aligned(baseline: ScoreTable, other: ScoreTable) -> ScoreTable:
    """The other table in the baseline's order of items. Raises NotComparable if they do not measure the same."""
    _check_items(baseline.items, other.items)
    _check_items(baseline.references, other.references)
    if changed := [item for item, reference in baseline.references.items() if other.references[item] != reference]:
        raise NotComparable(
            f"{len(changed)} items are scored by other references, one is {changed[0]!r}; evaluate both on one version "
            "of the benchmark"
        )
    row_of = {item: row for row, item in enumerate(other.items)}
    order = [row_of[item] for item in baseline.items]
    one = replace(
        other,
        items=baseline.items,
        groups=tuple(other.groups[row] for row in order),
        slices=tuple(other.slices[row] for row in order),
        values=other.values[order],
    )
    for item, *facts in zip(baseline.items, baseline.groups, one.groups, baseline.slices, one.slices, strict=True):
        if facts[0] != facts[1] or facts[2] != facts[3]:
            raise NotComparable(
                f"item {item!r} is of group {facts[0]!r} and slices {facts[2]} for the baseline, but of {facts[1]!r} "
                f"and {facts[3]} for the candidate; score both by one version of the benchmark"
            )
    if _kind(baseline) != _kind(one):
        raise NotComparable(
            "the two differ in statistic, number of columns, unit or direction; score both by one version of the "
            "benchmark"
        )
    if baseline.unit == PER_TOKEN and len(rows := np.flatnonzero(baseline.values[:, 1] != one.values[:, 1])):
        tokens = [int(table.values[rows[0], 1]) for table in (baseline, one)]
        raise NotComparable(
            f"{len(rows)} items have other numbers of tokens, such as {baseline.items[rows[0]]!r} with {tokens[0]} and "
            f"{tokens[1]}; {PER_TOKEN} of different tokenizers say nothing: take a metric of answers"
        )
    return one


def _check_items(baseline: Collection[str], other: Collection[str]) -> None:
    if missing := set(baseline) ^ set(other):
        raise NotComparable(
            f"the two differ in {len(missing)} items, one is {min(missing)!r}; a comparison needs the same items: "
            "evaluate both on one version of the benchmark, with one policy of failed items"
        )


def _kind(table: ScoreTable) -> object:
    """What must be the same for two columns of scores to be compared."""
    return table.statistic, table.lower_is_better, table.unit, table.values.shape[1:]
