"""Drift: the numbers of a published MMD, an exact null distribution, and the declared rate of false alarms."""

import math

import numpy as np
import pytest
from scipy import stats

from tests.seed import SEED
from vila_ops.config.retrain import DriftRules
from vila_ops.config.schedule import Schedule
from vila_ops.retrain.drift import (
    Vectors,
    compare,
    effect_size,
    gaussian_kernel,
    level_of,
    mmd2,
    mmd_test,
    psi,
    unit_means,
)

X = np.array([[(7 * i * i + 3 * i * j + j) % 11 for j in range(3)] for i in range(12)], np.float64)
Y = np.array([[(5 * i * i + 2 * i * j + 3 * j) % 11 + 1 for j in range(3)] for i in range(9)], np.float64)


@pytest.mark.parametrize(
    ("shift", "expected", "p_value"), [(0, 0.2750074577060153, 0.0020), (3, 0.58644000866990698, 1e-4)]
)
def test_mmd_and_p_value_are_those_of_the_published_code(shift: int, expected: float, p_value: float) -> None:
    """MMD2u and 20,000 permutations of github.com/emanuele/kernel_two_sample_test, on scikit-learn's kernel."""
    kernel = gaussian_kernel(np.concatenate([X, Y + shift]))
    assert mmd2(kernel, len(X)) == pytest.approx(expected, rel=1e-8)
    value, p = mmd_test(kernel, len(X), level=0.001, rng=np.random.default_rng(SEED))
    assert value == pytest.approx(expected, rel=1e-8)
    assert p == pytest.approx(p_value, abs=0.0008)


def test_the_p_value_is_that_of_all_permutations() -> None:
    before, now = X[:5], Y[:4]
    kernel = gaussian_kernel(np.concatenate([before, now]))
    everywhere = np.arange(9)

    def statistic(one: np.ndarray, other: np.ndarray) -> float:
        order = np.concatenate([one, other])
        return mmd2(kernel[np.ix_(order, order)], len(one))

    exact = stats.permutation_test(
        (everywhere[:5], everywhere[5:]), statistic, alternative="greater", n_resamples=np.inf
    )
    draws = [mmd_test(kernel, 5, level=0.01, rng=np.random.default_rng([SEED, n]))[1] for n in range(30)]
    assert np.mean(draws) == pytest.approx(exact.pvalue, rel=0.15)


def test_psi_and_effect_size_by_hand() -> None:
    """Shares with half a unit more: 1/2, 1/2 and 5/6, 1/6, so (1/3) ln(5/3) - (1/3) ln(1/3) = ln(5) / 3."""
    assert psi(np.array([1, 1]), np.array([7, 1])) == pytest.approx(math.log(5) / 3)
    assert psi(np.array([3, 3]), np.array([9, 9])) == pytest.approx(0)
    # Within both groups 1/2, between them 0: MMD² 1, a quarter of it between, (1/2 + 1/2) / 2 within.
    kernel = np.array([[1, 0.5, 0, 0], [0.5, 1, 0, 0], [0, 0, 1, 0.5], [0, 0, 0.5, 1]])
    assert mmd2(kernel, 2) == pytest.approx(1)
    assert effect_size(kernel, 2, 1.0) == pytest.approx(1 / 3)
    assert effect_size(kernel, 2, -0.1) == 0


def test_the_mean_of_a_unit_is_one_row() -> None:
    rows = np.array([[1.0, 2.0], [3.0, 4.0], [10.0, 20.0]])
    assert unit_means(rows, ["b", "b", "a"]).tolist() == [[10.0, 20.0], [2.0, 3.0]]


def test_the_level_shares_the_yearly_rate_among_windows_and_streams() -> None:
    """52.18 weeks a year and four streams are 208.7 tests."""
    assert level_of(DriftRules(), Schedule(), streams=4) == pytest.approx(1 / 208.7, rel=1e-3)
    assert level_of(DriftRules(false_alarms_per_year=2), Schedule(window_hours=24), streams=1) == pytest.approx(
        2 / 365.25
    )
    assert level_of(DriftRules(false_alarms_per_year=1000), Schedule(), streams=1) == 0.5


def test_a_thousand_windows_without_drift_fire_at_the_declared_yearly_rate() -> None:
    """Weeks of two streams with 10 false alarms declared a year; skewed and heavy-tailed embeddings."""
    windows, streams, rules, schedule = 1000, 2, DriftRules(false_alarms_per_year=10), Schedule()
    level, rng, fired = level_of(rules, schedule, streams=streams), np.random.default_rng(SEED), 0
    for window in range(windows):
        for stream in range(streams):
            rows = rng.standard_t(3, (32, 4)) if stream else rng.exponential(size=(32, 4))
            one = compare("", rows[:20], rows[20:], level=level, min_effect=0.0, rng=rng)
            assert one is not None, window
            fired += one.drifted
    years = windows * schedule.window_hours / (24 * 365.25)
    low, high = stats.poisson.interval(0.998, rules.false_alarms_per_year * years)
    assert low <= fired <= high


def test_users_who_repeat_themselves_are_no_drift() -> None:
    """Users with ten alike requests each: rows that are permuted one by one fire nearly always."""
    rng, level, fired, naive = np.random.default_rng(SEED), 0.05, 0, 0
    for _ in range(20):
        users = rng.normal(size=(40, 4))
        rows = np.repeat(users, 10, axis=0) + rng.normal(scale=0.1, size=(400, 4))
        names = [str(number) for number in np.repeat(np.arange(40), 10)]
        before, now = unit_means(rows[:200], names[:200]), unit_means(rows[200:], names[200:])
        fired += _fires(before, now, level, rng)
        naive += _fires(rows[:200], rows[200:], level, rng)
    assert fired <= stats.binom.ppf(0.999, 20, level)
    assert naive >= 15


def test_a_shift_is_found_and_a_tiny_one_is_too_small_to_count() -> None:
    rng = np.random.default_rng(SEED)
    before = rng.normal(size=(400, 8))
    large = compare("s", before, rng.normal(size=(400, 8)) + 0.7, level=0.005, min_effect=0.01, rng=rng)
    small = compare("s", before, rng.normal(size=(400, 8)) + 0.15, level=0.05, min_effect=0.05, rng=rng)
    assert large is not None
    assert large.drifted
    assert large.psi > 0.1 > large.psi_by_chance
    assert small is not None
    assert small.p_value <= 0.05
    assert not small.drifted


def test_too_few_units_are_not_compared() -> None:
    rng = np.random.default_rng(SEED)
    assert compare("s", np.zeros((9, 2)), np.ones((50, 2)), level=0.05, min_effect=0.0, rng=rng) is None


def _fires(before: Vectors, now: Vectors, level: float, rng: np.random.Generator) -> bool:
    one = compare("s", before, now, level=level, min_effect=0.0, rng=rng)
    assert one is not None
    return one.drifted
