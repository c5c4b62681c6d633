"""What the cells of a grid show: values and differences over seeds and items, and whether each claim holds. Pure.

An interval counts two sources of chance. Items are drawn by the bootstrap over groups of items, the same groups for all
cells and seeds; its variance is v1, with C - 1 degrees of freedom for C groups. Seeds vary with a variance s^2 between
the S of them, v2 = s^2 / S with S - 1 degrees. The variance of a mean over seeds is at most v1 + v2, since v2 holds the
part of items that differs between seeds too; its degrees of freedom are those of Satterthwaite ("An approximate
distribution of estimates of variance components", Biometrics Bulletin 2, 1946):
(v1 + v2)^2 / (v1^2 / (C - 1) + v2^2 / (S - 1)).

Differences are taken seed by seed on the same items, so that what a seed or an item does to both cells cancels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vila_ops.config import Config
from vila_ops.config.grid import Claim, Grid
from vila_ops.eval.compare import NotComparable, ScoreTable, aligned
from vila_ops.eval.statistics import COVERAGE, FloatArray, OfSums, cluster_bootstrap, cluster_sums

Verdict = Literal["shown", "not shown", "contradicted"]
Tables = Mapping[str, Sequence[ScoreTable]]
"""The scores of each cell by one metric, a table for each seed."""


class Estimate(Config):
    """A mean over seeds with its 95 % interval, in the metric's unit."""

    value: float
    low: float
    high: float
    by_seed: tuple[float, ...]


class MetricResult(Config):
    """One metric of all cells."""

    metric: str
    unit: str
    lower_is_better: bool
    n: int
    """Number of items."""
    values: dict[str, Estimate]
    differences: dict[str, Estimate]
    """Of each cell but the first: cell minus the first one."""


class ClaimResult(Config):
    """A claim and what was found."""

    claim: Claim
    advantage: Estimate
    """Of `cell` over `than`, less that of the pair `over`; positive where the claim is right."""
    verdict: Verdict


class GridResult(Config):
    """All that a grid shows."""

    grid: Grid
    metrics: tuple[MetricResult, ...]
    claims: tuple[ClaimResult, ...]


def grid_result(grid: Grid, scores: Mapping[str, Tables]) -> GridResult:
    """What a grid shows by the scores of its metrics. Raises NotComparable for cells with different items."""
    by_metric = {metric: _aligned(scores[metric]) for metric in grid.metrics}
    return GridResult(
        grid=grid,
        metrics=tuple(_metric(metric, tables, resamples=grid.resamples) for metric, tables in by_metric.items()),
        claims=tuple(_claim(claim, by_metric[claim.metric], resamples=grid.resamples) for claim in grid.claims),
    )


def _metric(metric: str, tables: Tables, *, resamples: int) -> MetricResult:
    first, *others = tables
    table = tables[first][0]
    return MetricResult(
        metric=metric,
        unit=table.unit,
        lower_is_better=table.lower_is_better,
        n=len(table.items),
        values={cell: _estimate([own], (1,), resamples=resamples) for cell, own in tables.items()},
        differences={cell: _estimate([tables[cell], tables[first]], (1, -1), resamples=resamples) for cell in others},
    )


def _claim(claim: Claim, tables: Tables, *, resamples: int) -> ClaimResult:
    better = -1 if tables[claim.cell][0].lower_is_better else 1
    signs = [better * sign for sign in (1, -1, -1, 1)]
    cells = claim.cells()
    advantage = _estimate([tables[cell] for cell in cells], signs[: len(cells)], resamples=resamples)
    return ClaimResult(claim=claim, advantage=advantage, verdict=_verdict(advantage, claim.by))


def _verdict(advantage: Estimate, by: float) -> Verdict:
    if advantage.low > by:
        return "shown"
    return "contradicted" if advantage.high < min(by, 0) else "not shown"


def _aligned(tables: Tables) -> Tables:
    """The same scores with the items of all tables in one order. Raises NotComparable."""
    first = next(iter(tables.values()))[0]
    seeds = {len(own) for own in tables.values()}
    if len(seeds) > 1:
        raise NotComparable(f"cells were measured with {sorted(seeds)} seeds; measure all with the same ones")
    return {cell: [aligned(first, table) for table in own] for cell, own in tables.items()}


@dataclass(frozen=True)
class _MeanOverSeeds:
    """A statistic's mean over seeds, added over cells with their signs, from the sums of all of them."""

    of: OfSums
    signs: tuple[int, ...]
    seeds: int

    def by_seed(self, sums: FloatArray) -> FloatArray:
        """(R, cells x S x K) -> (R, S)."""
        values = [self.of(part) for part in np.split(sums, len(self.signs) * self.seeds, axis=1)]
        by_cell = np.stack(values, axis=1).reshape(len(sums), len(self.signs), self.seeds)
        added: FloatArray = np.einsum("rcs,c->rs", by_cell, np.array(self.signs, dtype=np.float64))
        return added

    def __call__(self, sums: FloatArray) -> FloatArray:
        """(R, cells x S x K) -> (R,)."""
        mean: FloatArray = self.by_seed(sums).mean(axis=1)
        return mean


def _estimate(cells: Sequence[Sequence[ScoreTable]], signs: Sequence[int], *, resamples: int) -> Estimate:
    """The mean over seeds of one cell, or of cells that are added with their signs."""
    first = cells[0][0]
    _, groups = np.unique(np.array(first.groups), return_inverse=True)
    parts = [cluster_sums(table.values, groups, table.statistic) for own in cells for table in own]
    sums = np.concatenate([part for part, _ in parts], axis=1)
    statistic = _MeanOverSeeds(parts[0][1], tuple(signs), len(cells[0]))
    clusters = np.arange(len(sums))
    drawn = cluster_bootstrap(sums, clusters, statistic=statistic, resamples=resamples, seed=0)
    by_seed = statistic.by_seed(sums.sum(axis=0, keepdims=True))[0]
    return _interval(by_seed, of_items=drawn.standard_error**2, clusters=drawn.clusters)


def over_seeds(values: Sequence[float]) -> Estimate:
    """The mean of one value for each seed, with the interval over seeds alone."""
    return _interval(np.array(values), of_items=0.0, clusters=2)


def _interval(by_seed: FloatArray, *, of_items: float, clusters: int) -> Estimate:
    """A mean over seeds, with the interval of the module's docstring; `of_items` is v1."""
    from scipy.special import stdtrit

    of_seeds = float(by_seed.var(ddof=1)) / len(by_seed)
    total = of_items + of_seeds
    half = 0.0
    if total > 0:
        freedom = total**2 / (of_items**2 / (clusters - 1) + of_seeds**2 / (len(by_seed) - 1))
        half = float(stdtrit(freedom, (1 + COVERAGE) / 2)) * math.sqrt(total)
    value = float(by_seed.mean())
    return Estimate(value=value, low=value - half, high=value + half, by_seed=tuple(by_seed.tolist()))
