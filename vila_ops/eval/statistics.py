"""Confidence intervals of metrics by the bootstrap over clusters of items. Pure.

Items that show the same object are not independent. Whole objects are therefore drawn with replacement, not items (the
cluster or block bootstrap: Davison & Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8; for
evaluations: Miller, "Adding Error Bars to Evals", arXiv:2411.00640).

The interval is the expanded percentile interval (Hesterberg, "What Teachers Should Know About the Bootstrap",
arXiv:1411.5279, section 5.3). The plain percentile interval of a mean is that of a normal distribution with the biased
variance, so it is too narrow for few clusters. The expanded one reads the replicas farther out, where the interval of
Student's t with the unbiased variance would end.

N items, C clusters, K columns of a statistic, R resamples, T distinct rows of cluster sums.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]

Clusters = Sequence[str] | NDArray[np.intp]
"""The cluster of each item, by name or by number; (N,)."""

OfSums = Callable[[FloatArray], FloatArray]
"""A function of the column sums over the drawn items, (R, K) -> (R,), for example F1 from counts of outcomes. Equal
ones are one statistic: one with settings is a frozen dataclass, not a closure."""

Statistic = Literal["mean", "mean_of_means", "ratio"] | OfSums
"""mean: every item has the same weight. mean_of_means: every cluster has the same weight, and its value is the mean of
its items. ratio: sum of column 0 / sum of column 1, such as negative log-likelihoods / tokens."""

PER_TOKEN = "nats per token"
"""The unit of a ratio whose column 1 counts tokens, which depend on the tokenizer."""
COVERAGE = 0.95
_CELLS_AT_ONCE = 2**18
"""Drawn numbers that are in memory at a time: 2 MiB of indices or counts and as much of values, which a cache holds."""
_COUNT_COST = 10
"""Time to draw one count of a multinomial, in draws of one index (measured: about 100 ns and 10 ns)."""
_STEPS = 2.0**32
"""Rows of sums that differ by less than a part in 2^32 of their column's largest value count as equal."""


class UndefinedStatistic(ValueError):
    """A statistic has no value or no interval on these items, such as a ratio whose denominators sum to 0."""


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval, in the unit of the statistic."""

    value: float
    """The statistic of the items themselves, not the mean of the resamples."""
    low: float
    high: float
    standard_error: float
    """Standard deviation of the replicas times sqrt(C / (C - 1)), which removes the bias of the bootstrap variance."""
    n: int
    """Number of items."""
    clusters: int
    """Number of distinct clusters, on which the width depends."""


def cluster_bootstrap(
    values: ArrayLike, clusters: Clusters, *, statistic: Statistic, resamples: int, seed: int
) -> Interval:
    """The interval of a statistic over resamples of the clusters.

    `values` is (N,) for a mean, (N, 2) for a ratio and (N, K), or (N,) for K = 1, for a statistic of sums. The order of
    the items changes the result by rounding only. An interval never exceeds the range of its replicas, so with fewer
    than about 10 clusters it is too narrow.
    Raises ValueError for a wrong shape or a value that is not finite, and UndefinedStatistic for fewer than two
    clusters or a statistic that is undefined on the items or on a resample.
    """
    sums, function = cluster_sums(values, clusters, statistic)
    return _interval(sums, function, items=len(clusters), resamples=resamples, seed=seed)


def paired_difference(
    first: ArrayLike, second: ArrayLike, clusters: Clusters, *, statistic: Statistic, resamples: int, seed: int
) -> Interval:
    """The interval of statistic(first) - statistic(second), two measurements of the same items in the same order.

    Both sides of a resample read the same clusters, so that an item's difficulty for both cancels. An interval without
    0 is a difference at the 5 % level. Shapes and errors are those of `cluster_bootstrap`.
    """
    first_sums, second_sums, function = paired_sums(first, second, clusters, statistic)
    width = first_sums.shape[1]
    if statistic in ("mean", "mean_of_means"):
        # The denominators are the same on both sides: fewer columns, and fewer distinct rows, say the same.
        sums = np.stack([first_sums[:, 0] - second_sums[:, 0], second_sums[:, 1]], axis=1)
        return _interval(sums, function, items=len(clusters), resamples=resamples, seed=seed)

    def difference(sums: FloatArray) -> FloatArray:
        with np.errstate(invalid="ignore"):  # infinity minus infinity, which `_interval` refuses
            return function(sums[:, :width]) - function(sums[:, width:])

    sums = np.concatenate([first_sums, second_sums], axis=1)
    return _interval(sums, difference, items=len(clusters), resamples=resamples, seed=seed)


def paired_sums(
    first: ArrayLike, second: ArrayLike, clusters: Clusters, statistic: Statistic
) -> tuple[FloatArray, FloatArray, OfSums]:
    """`cluster_sums` of two measurements of the same items, and their function. Raises ValueError, as it does."""
    first_sums, function = cluster_sums(first, clusters, statistic)
    second_sums, _ = cluster_sums(second, clusters, statistic)
    if second_sums.shape != first_sums.shape:
        raise ValueError(
            f"first has {first_sums.shape[1]} columns and second {second_sums.shape[1]}; give both the same"
        )
    return first_sums, second_sums, function


def cluster_sums(values: ArrayLike, clusters: Clusters, statistic: Statistic) -> tuple[FloatArray, OfSums]:
    """The sums over each cluster, (C, K) with clusters in sorted order, and the statistic as a function of sums.

    A mean has the items' number as its second column; for mean_of_means both columns are divided by it.
    Raises ValueError and UndefinedStatistic, see `cluster_bootstrap`.
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim not in (1, 2) or len(table) != len(clusters):
        raise ValueError(f"values of shape {table.shape} for {len(clusters)} items; give one row for each item")
    if table.ndim == 1:
        table = table[:, np.newaxis]
    if len(bad := np.flatnonzero(~np.isfinite(table).all(axis=1))):
        raise ValueError(
            f"{len(bad)} values are not finite, the first is item {bad[0]} of cluster {clusters[bad[0]]!r}"
        )
    width = table.shape[1]
    if statistic in ("mean", "mean_of_means"):
        if width != 1:
            raise ValueError(f"{width} columns for {statistic!r}; give one number for each item")
        table = np.concatenate([table, np.ones_like(table)], axis=1)
    elif statistic == "ratio" and width != 2:
        raise ValueError(f"{width} columns for 'ratio'; give numerator and denominator of each item")
    names, members, sizes = np.unique(np.asarray(clusters), return_inverse=True, return_counts=True)
    if len(names) < 2:
        raise UndefinedStatistic(
            f"{len(table)} items in {len(names)} clusters; an interval needs at least two clusters"
        )
    sums: FloatArray = np.stack([np.bincount(members, weights=column) for column in table.T], axis=1)
    if statistic == "mean_of_means":
        sums = sums / sizes[:, np.newaxis]  # (mean of the cluster, 1)
    return sums, statistic if callable(statistic) else _ratio


def check_defined(replicas: FloatArray) -> None:
    """Refuse replicas of a statistic that are not all numbers. Raises UndefinedStatistic."""
    if undefined := np.count_nonzero(~np.isfinite(replicas)):
        raise UndefinedStatistic(
            f"the statistic is undefined on {undefined} of {len(replicas)} resamples; evaluate more clusters"
        )


def distinct_rows(sums: FloatArray) -> tuple[FloatArray, NDArray[np.intp]]:
    """The distinct rows, (T, K), and how many clusters have each; rows that differ by rounding only are averaged."""
    largest = np.abs(sums).max(axis=0)
    steps = np.rint(sums / np.where(largest > 0, largest, 1) * _STEPS)
    _, members, counts = np.unique(steps, axis=0, return_inverse=True, return_counts=True)
    return np.stack([np.bincount(members, weights=column) for column in sums.T], axis=1) / counts[:, np.newaxis], counts


def _ratio(sums: FloatArray) -> FloatArray:
    """(R, 2) -> (R,); NaN or infinite where column 1 sums to 0, which `_interval` refuses."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums[:, 0] / sums[:, 1]


def _interval(sums: FloatArray, function: OfSums, *, items: int, resamples: int, seed: int) -> Interval:
    value = float(function(sums.sum(axis=0, keepdims=True))[0])
    if not np.isfinite(value):
        raise UndefinedStatistic(f"the statistic is {value} on the {items} items; look for denominators that sum to 0")
    replicas = np.concatenate([function(drawn) for drawn in _drawn_sums(sums, resamples=resamples, seed=seed)])
    check_defined(replicas)
    clusters = len(sums)
    tail = _tail(clusters)
    low, high = np.quantile(replicas, [tail, 1 - tail])
    error = float(replicas.std() * np.sqrt(clusters / (clusters - 1)))
    return Interval(value, float(low), float(high), standard_error=error, n=items, clusters=clusters)


def _tail(clusters: int) -> float:
    """The share of replicas below the expanded interval, as many as above it; 2.5 % for very many clusters."""
    from scipy.special import ndtr, stdtrit

    quantile = stdtrit(clusters - 1, (1 + COVERAGE) / 2)
    return float(ndtr(-np.sqrt(clusters / (clusters - 1)) * quantile))


def _drawn_sums(sums: FloatArray, *, resamples: int, seed: int) -> Iterator[FloatArray]:
    """Column sums over C of the C clusters, drawn with replacement, for each resample, (R, K); in several parts.

    Clusters with equal sums are interchangeable, so the numbers of draws of each distinct row are one multinomial, and
    the cost is R x T. Where most rows differ (continuous scores) the clusters themselves are drawn, at R x C.
    """
    generator = np.random.default_rng(seed)
    clusters = len(sums)
    rows, counts = distinct_rows(sums)
    by_count = _COUNT_COST * len(rows) <= clusters
    at_once = max(1, _CELLS_AT_ONCE // (len(rows) if by_count else clusters))
    columns = [(np.ascontiguousarray(column), column.min() < column.max()) for column in sums.T]
    for size in (min(at_once, resamples - start) for start in range(0, resamples, at_once)):
        if by_count:
            yield generator.multinomial(clusters, counts / clusters, size=size).astype(np.float64) @ rows
        else:
            draws = generator.integers(clusters, size=(size, clusters))
            parts = [column[draws].sum(axis=1) if varies else np.full(size, column.sum()) for column, varies in columns]
            yield np.stack(parts, axis=1)
