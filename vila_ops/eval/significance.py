"""Tests of a difference between two models on the same items, with the items of a cluster kept together. Pure.

The test is a permutation test. If two models are equally good, their names may be exchanged within any cluster without
changing what is likely, so the p-value is the share of such exchanges whose difference is at least as large as the one
that was seen (two-sided). Nothing is assumed about the scores, nor about items of one cluster. See Good, "Permutation,
Parametric and Bootstrap Tests of Hypotheses", 2005, section 3.5 (sign flips of matched pairs).

C clusters, K columns of a statistic, R resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vila_ops.eval.statistics import (
    Clusters,
    FloatArray,
    OfSums,
    Statistic,
    UndefinedStatistic,
    check_defined,
    distinct_rows,
    paired_sums,
)

TestName = Literal["mcnemar_mid_p", "sign_flip_mid_p", "sign_flip_sampled"]
"""mcnemar_mid_p: right/wrong with one item in each cluster. sign_flip_mid_p: a mean of whole numbers, such as
right/wrong, with any clusters. sign_flip_sampled: any other statistic."""

LEVEL, POWER = 0.05, 0.8
"""Of the minimum detectable effect."""
SMALLEST_MID_P = 1e-10
"""A mid-p-value below this is given as this, since rounding may be of its size."""
_LARGEST_SUM = 2**20
"""The largest sum of whole numbers whose distribution is computed: 16 MiB an array."""
_TIES = 1e-12
"""Differences that are equal up to this part of the statistic count as equal."""
_BINOMIAL_COST = 100
"""Time to draw one binomial number, in choices of one cluster (measured: about 70 ns and 0.7 ns)."""
_CHOICES = (np.arange(256)[:, np.newaxis] >> np.arange(8)) & 1
"""All choices among eight clusters, (256, 8)."""


@dataclass(frozen=True)
class PairedTest:
    """The two-sided p-value of a difference, and the test that gave it."""

    name: TestName
    p: float


def paired_test(
    first: ArrayLike, second: ArrayLike, clusters: Clusters, *, statistic: Statistic, resamples: int, seed: int
) -> PairedTest:
    """Test whether a statistic differs between two measurements of the same items in the same order.

    Shapes and errors are those of `statistics.paired_difference`. `resamples` and `seed` are for the sampled test. Its
    p-value is (1 + exchanges at least as large) / (1 + R), which is valid for any R (Phipson & Smyth, "Permutation
    P-values Should Never Be Zero", 2010).
    """
    first_sums, second_sums, function = paired_sums(first, second, clusters, statistic)
    gaps = first_sums - second_sums
    if statistic in ("mean", "mean_of_means"):
        whole = gaps[:, 0]
        if np.array_equal(whole, np.rint(whole)) and np.abs(whole).sum() <= _LARGEST_SUM:
            alone = len(whole) == len(clusters) and _is_right_or_wrong(first) and _is_right_or_wrong(second)
            return PairedTest("mcnemar_mid_p" if alone else "sign_flip_mid_p", sign_flip_mid_p(whole.astype(np.int64)))
    p = _sampled_p(gaps, second_sums.sum(axis=0), function, resamples=resamples, seed=seed)
    return PairedTest("sign_flip_sampled", p)


def sign_flip_mid_p(gaps: NDArray[np.int64]) -> float:
    """The mid-p-value of whole differences of clusters, (C,), among all 2^C sign flips.

    It counts half of the flips whose sum is exactly as far from 0 as the one seen. Counting all of them is exact but
    rejects at 24 images in 3 % of the cases instead of 5 %, which costs power. For differences of -1, 0 and 1 this is
    McNemar's mid-p-value (Fagerland, Lydersen & Laake, BMC Medical Research Methodology 13:91, 2013).

    The distribution of the sum is read from its characteristic function, the product of cos(t |gap|) over the clusters,
    by one Fourier transform.
    """
    sizes, counts = np.unique(np.abs(gaps[gaps != 0]), return_counts=True)
    if len(sizes) == 0:
        return 1.0
    unit = int(np.gcd.reduce(sizes))
    sizes, observed = sizes // unit, abs(int(gaps.sum())) // unit
    points = 1 << (2 * int(sizes @ counts)).bit_length()  # so many sums that none wraps around
    angles = 2 * np.pi * np.arange(points // 2 + 1) / points
    transform = np.ones_like(angles)
    for size, count in zip(sizes, counts, strict=True):
        transform *= np.cos(angles * size) ** count
    chances = np.fft.irfft(transform, points)  # of the sum s at s, and of -s at points - s
    if observed == 0:
        return float(1 - chances[0] / 2)
    farther = chances[observed + 1 : points - observed].sum()
    return float(np.clip(farther + chances[observed], SMALLEST_MID_P, 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted for all tests of the family by Holm's step-down method, in the given order.

    Rejecting where the adjusted value is at most 5 % keeps the chance of any false difference in the family at 5 %,
    however the tests depend on each other (Holm, Scandinavian Journal of Statistics 6:65, 1979).
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return [float(value) for value in adjusted]


def minimum_detectable_effect(standard_error: float, clusters: int) -> float:
    """The true difference that a two-sided test at 5 % detects in 80 % of the cases, in the unit of the error.

    The solution of Student's noncentral t distribution with C - 1 degrees of freedom, as statsmodels' `TTestPower` has
    it; the chance of a significant difference of the wrong sign is left out (below 1e-5 at these levels).
    """
    from scipy.special import nctdtrinc, stdtrit

    critical = stdtrit(clusters - 1, 1 - LEVEL / 2)
    return standard_error * float(nctdtrinc(clusters - 1, 1 - POWER, critical))


def _is_right_or_wrong(scores: ArrayLike) -> bool:
    return bool(np.isin(np.asarray(scores, dtype=np.float64), (0.0, 1.0)).all())


def _sampled_p(gaps: FloatArray, second: FloatArray, function: OfSums, *, resamples: int, seed: int) -> float:
    """The p-value over random exchanges.

    `gaps` is first - second of each cluster, (C, K); `second` has the second's column sums, (K,).
    """
    first = second + gaps.sum(axis=0)
    values = function(np.stack([first, second]))
    if not np.isfinite(values).all():
        raise UndefinedStatistic(f"the statistic is {values[0]} and {values[1]}; look for denominators that sum to 0")
    exchanged = second + _random_halves(gaps, resamples=resamples, seed=seed)
    with np.errstate(invalid="ignore"):  # infinity minus infinity, which is refused next
        replicas = function(exchanged) - function(first + second - exchanged)
    check_defined(replicas)
    observed = abs(float(values[0] - values[1])) - _TIES * float(np.abs(values).max())
    return (1 + int(np.count_nonzero(np.abs(replicas) >= observed))) / (1 + resamples)


def _random_halves(gaps: FloatArray, *, resamples: int, seed: int) -> FloatArray:
    """Sums over random choices of the clusters, each in or out with equal chance, (R, K).

    Of clusters with equal rows a binomial number is chosen. Where most rows differ, one random byte chooses among eight
    clusters, and their 256 sums are looked up.
    """
    generator = np.random.default_rng(seed)
    differing = gaps[gaps.any(axis=1)]
    if not len(differing):
        return np.zeros((resamples, gaps.shape[1]))
    rows, counts = distinct_rows(differing)
    if _BINOMIAL_COST * len(rows) <= len(differing):
        return generator.binomial(counts, 0.5, size=(resamples, len(rows))).astype(np.float64) @ rows
    padded = np.concatenate([differing, np.zeros((-len(differing) % 8, gaps.shape[1]))])
    columns = np.flatnonzero(gaps.any(axis=0))
    sums = np.zeros((resamples, gaps.shape[1]))
    for eight in padded.reshape(-1, 8, gaps.shape[1]):
        choices = generator.integers(256, size=resamples, dtype=np.uint8)
        for column in columns:
            sums[:, column] += (_CHOICES @ eight[:, column])[choices]
    return sums
