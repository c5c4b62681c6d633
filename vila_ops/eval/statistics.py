"""Confidence intervals of metrics by the percentile bootstrap over clusters of items. Pure.

Items that show the same object are not independent. Whole objects are therefore drawn with replacement, not items (the
cluster or block bootstrap: Davison & Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8; for
evaluations: Miller, "Adding Error Bars to Evals", arXiv:2411.00640). The interval is Efron's percentile interval.

N items, C clusters, K columns of a statistic, R resamples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]

OfSums = Callable[[FloatArray], FloatArray]
"""A function of the column sums over the drawn items, (R, K) -> (R,), for example F1 from counts of outcomes."""

Statistic = Literal["mean", "mean_of_means", "ratio"] | OfSums
"""mean: every item has the same weight. mean_of_means: every cluster has the same weight, and its value is the mean of
its items. ratio: sum of column 0 / sum of column 1, such as negative log-likelihoods / tokens."""

COVERAGE = 0.95
_CELLS_AT_ONCE = 2**22
"""Resampling weights that are in memory at a time: 64 MiB, as integers and as float64."""


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval, in the unit of the statistic."""

    value: float
    """The statistic of the items themselves, not the mean of the resamples."""
    low: float
    high: float
    n: int
    """Number of items."""
    clusters: int
    """Number of distinct clusters, on which the width depends."""


def cluster_bootstrap(
    values: ArrayLike, clusters: Sequence[str], *, statistic: Statistic, resamples: int, seed: int
) -> Interval:
    """The interval of a statistic over resamples of the clusters.

    `values` is (N,) for a mean, (N, 2) for a ratio and (N, K), or (N,) for K = 1, for a statistic of sums; `clusters`
    names the cluster of each item. The order of the items changes the result by rounding only. With fewer than about 20
    clusters the interval is too narrow, as that of every percentile bootstrap.
    Raises ValueError for a wrong shape, a value that is not finite, fewer than two clusters, or a statistic that is
    undefined on the items or on a resample (a ratio whose denominators sum to 0).
    """
    sums, function = _cluster_sums(values, clusters, statistic)
    return _interval(sums, function, items=len(clusters), resamples=resamples, seed=seed)


def paired_difference(
    first: ArrayLike, second: ArrayLike, clusters: Sequence[str], *, statistic: Statistic, resamples: int, seed: int
) -> Interval:
    """The interval of statistic(first) - statistic(second), two measurements of the same items in the same order.

    Both sides of a resample read the same clusters, so that an item's difficulty for both cancels. An interval without
    0 is a difference at the 5 % level. Shapes and errors are those of `cluster_bootstrap`.
    """
    first_sums, function = _cluster_sums(first, clusters, statistic)
    second_sums, _ = _cluster_sums(second, clusters, statistic)
    width = first_sums.shape[1]
    if second_sums.shape[1] != width:
        raise ValueError(f"first has {width} columns and second {second_sums.shape[1]}; give both the same")

    def difference(sums: FloatArray) -> FloatArray:
        return function(sums[:, :width]) - function(sums[:, width:])

    sums = np.concatenate([first_sums, second_sums], axis=1)
    return _interval(sums, difference, items=len(clusters), resamples=resamples, seed=seed)


def _ratio(sums: FloatArray) -> FloatArray:
    """(R, 2) -> (R,); NaN or infinite where column 1 sums to 0, which `_interval` refuses."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums[:, 0] / sums[:, 1]


def _cluster_sums(values: ArrayLike, clusters: Sequence[str], statistic: Statistic) -> tuple[FloatArray, OfSums]:
    """The sums over each cluster, (C, K) with clusters in sorted order, and the statistic as a function of sums."""
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
        raise ValueError(f"{len(table)} items in {len(names)} clusters; an interval needs at least two clusters")
    sums: FloatArray = np.stack([np.bincount(members, weights=column) for column in table.T], axis=1)
    if statistic == "mean_of_means":
        sums = sums / sizes[:, np.newaxis]  # (mean of the cluster, 1)
    return sums, statistic if callable(statistic) else _ratio


def _interval(sums: FloatArray, function: OfSums, *, items: int, resamples: int, seed: int) -> Interval:
    """Draw C of the C clusters `resamples` times. Counts of draws are multinomial, so one product sums the clusters."""
    value = float(function(sums.sum(axis=0, keepdims=True))[0])
    if not np.isfinite(value):
        raise ValueError(f"the statistic is {value} on the {items} items; look for denominators that sum to 0")
    generator = np.random.default_rng(seed)
    clusters = len(sums)
    at_once = max(1, _CELLS_AT_ONCE // clusters)
    drawn = [
        function(generator.multinomial(clusters, np.full(clusters, 1 / clusters), size=rows).astype(np.float64) @ sums)
        for rows in (min(at_once, resamples - start) for start in range(0, resamples, at_once))
    ]
    replicas = np.concatenate(drawn)
    if undefined := np.count_nonzero(~np.isfinite(replicas)):
        raise ValueError(f"the statistic is undefined on {undefined} of {resamples} resamples; evaluate more clusters")
    low, high = np.quantile(replicas, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return Interval(value=value, low=float(low), high=float(high), n=items, clusters=clusters)
