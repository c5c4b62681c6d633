"""Whether two samples of embeddings differ, and how much: MMD with a permutation test, an effect size, PSI. Pure.

The kernel is Gaussian with the median of the pooled squared distances as its width, which no permutation changes
(Gretton et al., "A kernel two-sample test", JMLR 13, 2012, sections 2, 3.2 and 8). What is permuted are units, such as
documents or users, as one row each: rows of one unit depend on each other.
"""

# N units before, M units now, F features, P permutations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vila_ops.config import Config
from vila_ops.config.retrain import HOURS_PER_YEAR, DriftRules
from vila_ops.config.schedule import Schedule

Vectors = NDArray[np.float64]
ENOUGH = 20
"""Permutations at least as extreme as the data, after which no more are drawn."""
CHUNK = 512
"""Permutations that are drawn together."""
BINS = 10
"""Of PSI, each with a tenth of the units before."""
FEWEST = 10
"""Units of each side below which nothing is tested."""


class Drift(Config):
    """The comparison of one stream of embeddings with what it was before."""

    stream: str
    before: int
    """Units."""
    now: int
    mmd2: float
    """Unbiased estimate of the squared maximum mean discrepancy."""
    p_value: float
    level: float
    """Below it the difference counts as real."""
    effect: float
    """Share of the spread, in the kernel's space and at equal sizes, that the change explains: r², 0 to 1."""
    psi: float
    """Population stability index along the first principal axis."""
    psi_by_chance: float
    """Its expectation where nothing has changed (Yurdakul 2018)."""
    drifted: bool


def level_of(rules: DriftRules, schedule: Schedule, *, streams: int) -> float:
    """The level of each test at which the expected number of false alarms in a year is the declared one.

    Expectations add up whatever depends on what, so nothing is assumed about streams. At most 0.5.
    """
    tests = streams * HOURS_PER_YEAR / schedule.window_hours
    return min(0.5, rules.false_alarms_per_year / tests)


def compare(
    stream: str, before: Vectors, now: Vectors, *, level: float, min_effect: float, rng: np.random.Generator
) -> Drift | None:
    """Compare units before (N, F) with units now (M, F); None for too few of either."""
    if min(len(before), len(now)) < FEWEST:
        return None
    kernel = gaussian_kernel(np.concatenate([before, now]))
    value, p_value = mmd_test(kernel, len(before), level=level, rng=rng)
    effect = effect_size(kernel, len(before), value)
    psi = projected_psi(before, now)
    return Drift(
        stream=stream,
        before=len(before),
        now=len(now),
        mmd2=value,
        p_value=p_value,
        level=level,
        effect=effect,
        psi=psi,
        psi_by_chance=(BINS - 1) * (1 / len(before) + 1 / len(now)),
        drifted=p_value <= level and effect >= min_effect,
    )


def unit_means(rows: Vectors, units: Sequence[str]) -> Vectors:
    """One row for each unit, the mean of its rows, in the order of the units' names."""
    _, place, count = np.unique(np.asarray(units), return_inverse=True, return_counts=True)
    sums = np.zeros((len(count), rows.shape[1]))
    np.add.at(sums, place, rows)
    means: Vectors = sums / count[:, None]
    return means


def gaussian_kernel(rows: Vectors) -> Vectors:
    """k(x, y) = exp(-|x - y|² / w), w the median of the squared distances between different rows; 1 where all agree."""
    from scipy.spatial.distance import pdist, squareform  # slow to import

    distances = pdist(rows, "sqeuclidean")
    width = float(np.median(distances)) or float(distances.mean()) or 1.0
    kernel: Vectors = squareform(np.exp(-distances / width))
    np.fill_diagonal(kernel, 1.0)
    return kernel


def mmd2(kernel: Vectors, first: int) -> float:
    """The unbiased MMD² of the first rows against the others (Gretton et al., Lemma 6)."""
    return float(_mmd2(kernel - np.diag(np.diag(kernel)), _labels(len(kernel), first)[None])[0])


def mmd_test(kernel: Vectors, first: int, *, level: float, rng: np.random.Generator) -> tuple[float, float]:
    """MMD² and the p-value of a test that permutes the pooled units: (b + 1) / (P + 1), b of them as extreme.

    Where ENOUGH permutations are as extreme, the number drawn until then gives the p-value, which is valid too (Besag
    and Clifford, "Sequential Monte Carlo p-values", Biometrika 78, 1991). There are as many permutations as make
    the level a multiple of 1 / (P + 1), so that it is reached exactly.
    """
    zeroed = kernel - np.diag(np.diag(kernel))
    labels = _labels(len(kernel), first)
    value = float(_mmd2(zeroed, labels[None])[0])
    most, drawn, extreme = int(np.ceil(ENOUGH / level)) - 1, 0, 0
    while drawn < most:
        permuted = rng.permuted(np.tile(labels, (min(CHUNK, most - drawn), 1)), axis=1)
        hits = extreme + np.cumsum(_mmd2(zeroed, permuted) >= value - 1e-12)
        if hits[-1] >= ENOUGH:
            return value, ENOUGH / (drawn + 1 + int(np.searchsorted(hits, ENOUGH)))
        drawn, extreme = drawn + len(permuted), int(hits[-1])
    return value, (extreme + 1) / (most + 1)


def _labels(total: int, first: int) -> Vectors:
    labels = np.zeros(total)
    labels[:first] = 1.0
    return labels


def _mmd2(zeroed: Vectors, labels: Vectors) -> Vectors:
    """MMD² (P,) by a kernel with zeros in its diagonal, for each row of labels (P, N + M), 1 for the units before."""
    n = labels[0].sum()
    m = len(zeroed) - n
    of_rows = zeroed.sum(axis=1)
    within = ((labels @ zeroed) * labels).sum(axis=1)
    between = labels @ of_rows - within
    within_other = of_rows.sum() - within - 2 * between
    values: Vectors = within / (n * (n - 1)) + within_other / (m * (m - 1)) - 2 * between / (n * m)
    return values


def effect_size(kernel: Vectors, first: int, value: float) -> float:
    """r²: the spread between the two means over the whole spread, in the kernel's space and for groups of one size.

    With a linear kernel and equal spreads it is d² / (d² + 4) of Cohen's d. `value` is the unbiased MMD².
    """
    n, m = first, len(kernel) - first
    own, other = kernel[:first, :first], kernel[first:, first:]
    spread = 2 - (own.sum() - np.trace(own)) / (n * (n - 1)) - (other.sum() - np.trace(other)) / (m * (m - 1))
    between = max(value, 0.0) / 4
    whole = between + spread / 2
    return float(between / whole) if whole > 0 else 0.0


def projected_psi(before: Vectors, now: Vectors) -> float:
    """PSI of both sides along the first principal axis of the units before, in bins of equal count before."""
    centre = before.mean(axis=0)
    axis = np.linalg.svd(before - centre, full_matrices=False)[2][0]
    old, new = (before - centre) @ axis, (now - centre) @ axis
    edges = np.quantile(old, np.linspace(0, 1, BINS + 1)[1:-1])
    return psi(_counts(old, edges), _counts(new, edges))


def psi(before: NDArray[np.int64], now: NDArray[np.int64]) -> float:
    """The population stability index of two histograms over the same bins; half a unit is added to each bin."""
    expected = (before + 0.5) / (before + 0.5).sum()
    actual = (now + 0.5) / (now + 0.5).sum()
    return float(((actual - expected) * np.log(actual / expected)).sum())


def _counts(values: Vectors, edges: Vectors) -> NDArray[np.int64]:
    return np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1)
