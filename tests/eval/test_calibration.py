"""How often the comparison of two equally good models says that they differ, and that of unequal ones.

VILA_CALIBRATION sets the number of simulated comparisons (200; `make faults`: 2 000); they are the same on every run.
10 000 of them gave 4.4 to 5.2 % of false differences by scenario, 4.8 % of suites with one after Holm's adjustment, and
the stated effect in 79.2 to 80.2 %.
"""

import os
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import optimize, stats

from vila_ops.eval.significance import holm, minimum_detectable_effect, paired_test
from vila_ops.eval.statistics import FloatArray, paired_difference

COUNT = int(os.environ.get("VILA_CALIBRATION", "200"))
CONFIDENCE = 0.95 if COUNT >= 2000 else 0.999
"""Of the interval of a rate. With few simulations a right rate would often be outside a 95 % interval."""
SEED = 0
LLAVA_BENCH = np.repeat([2, 3], [12, 12])
"""Questions of each of its 24 images, 60 in all; which image has how many does not matter here."""
POPE = np.repeat([6], 100)
ALONE = np.repeat([1], 300)
SIZES = {"llava_bench": LLAVA_BENCH, "pope": POPE, "alone": ALONE}
SCENARIOS = [*(("right_or_wrong", name) for name in SIZES), ("judged", "llava_bench"), ("judged", "pope")]
# An item that both models have right, and right answers about an image that a model knows, or does not.
EASY, KNOWN, UNKNOWN = 0.2, 0.9, 0.4
KNOWS = 0.3
"""Share of images that the baseline knows."""

# S simulations, N items, C images


def right_or_wrong(sizes: NDArray[np.int64], knows: tuple[float, float], seed: int) -> FloatArray:
    """Scores of baseline and candidate, (2, S, N), that know so many images; a model knows an image or does not."""
    rng = np.random.default_rng([SEED, seed, len(sizes)])
    known = rng.random((2, COUNT, len(sizes))) < np.reshape(knows, (2, 1, 1))
    chance = np.where(np.repeat(known, sizes, axis=2), KNOWN, UNKNOWN)
    easy = rng.random((COUNT, sizes.sum())) < EASY
    return ((rng.random(chance.shape) < chance) | easy).astype(np.float64)


def difference_of_right(sizes: NDArray[np.int64], knows: tuple[float, float]) -> tuple[float, float]:
    """The expected difference of `right_or_wrong`, and its standard error; by hand from the moments of an item."""
    baseline, candidate = (UNKNOWN + (KNOWN - UNKNOWN) * share for share in knows)
    hard, gap = 1 - EASY, candidate - baseline
    variance = hard * (baseline + candidate - 2 * baseline * candidate) - (hard * gap) ** 2
    covariance = hard**2 * (KNOWN - UNKNOWN) ** 2 * sum(share * (1 - share) for share in knows)
    total = (sizes * variance + sizes * (sizes - 1) * covariance).sum()
    return hard * gap, float(np.sqrt(total)) / int(sizes.sum())


def judged(sizes: NDArray[np.int64], gap: float, seed: int) -> FloatArray:
    """Scores of a judge, (2, S, N): image and item vary by 1 for each model, the image by 1.5 for both."""
    rng = np.random.default_rng([SEED, seed, len(sizes)])
    shared, own = rng.normal(6, 1.5, size=(COUNT, len(sizes))), rng.normal(size=(2, COUNT, len(sizes)))
    scores = np.repeat(shared + own, sizes, axis=2)
    return scores + rng.normal(size=scores.shape) + np.reshape([0, gap], (2, 1, 1))


def error_of_judged(sizes: NDArray[np.int64]) -> float:
    return float(np.sqrt((2 * sizes**2 + 2 * sizes).sum())) / int(sizes.sum())


def p_values(scores: FloatArray, clusters: NDArray[np.intp]) -> list[float]:
    return [
        paired_test(candidate, baseline, clusters, statistic="mean", resamples=999, seed=seed).p
        for seed, (baseline, candidate) in enumerate(scores.swapaxes(0, 1))
    ]


def images(name: str) -> NDArray[np.intp]:
    return np.repeat(np.arange(len(SIZES[name])), SIZES[name])


@cache
def equals(kind: str, name: str) -> FloatArray:
    """Scores of two equally good models."""
    sizes = SIZES[name]
    return right_or_wrong(sizes, (KNOWS, KNOWS), seed=1) if kind == "right_or_wrong" else judged(sizes, 0, seed=3)


@cache
def p_of_equals(kind: str, name: str) -> list[float]:
    return p_values(equals(kind, name), images(name))


def interval_of(count: int) -> tuple[float, float]:
    """The exact (Clopper-Pearson) interval of a share of the simulations."""
    interval = stats.binomtest(count, COUNT).proportion_ci(CONFIDENCE)
    return interval.low, interval.high


def significant(values: list[float]) -> int:
    return sum(value <= 0.05 for value in values)


@pytest.mark.parametrize(("kind", "name"), SCENARIOS)
def test_equal_models_differ_significantly_in_at_most_five_percent(kind: str, name: str) -> None:
    assert interval_of(significant(p_of_equals(kind, name)))[0] <= 0.05


@pytest.mark.parametrize(("kind", "name"), SCENARIOS)
def test_intervals_of_equal_models_miss_zero_in_at_most_five_percent(kind: str, name: str) -> None:
    misses = 0
    for seed, (baseline, candidate) in enumerate(equals(kind, name).swapaxes(0, 1)):
        interval = paired_difference(candidate, baseline, images(name), statistic="mean", resamples=1000, seed=seed)
        misses += not interval.low <= 0 <= interval.high
    assert interval_of(misses)[0] <= 0.05


def test_items_of_an_image_that_count_as_independent_differ_too_often() -> None:
    scores = equals("right_or_wrong", "pope")
    assert interval_of(significant(p_values(scores, np.arange(scores.shape[2]))))[0] > 0.05


def test_a_suite_of_equal_models_has_a_false_difference_in_at_most_five_percent() -> None:
    suites = list(zip(*(p_of_equals(kind, name) for kind, name in SCENARIOS), strict=True))
    assert interval_of(significant([min(holm(suite)) for suite in suites]))[0] <= 0.05
    assert interval_of(significant([min(suite) for suite in suites]))[0] > 0.05, "without Holm there are more"


@pytest.mark.parametrize("name", SIZES)
def test_right_and_wrong_answers_show_the_stated_effect_in_eighty_percent(name: str) -> None:
    sizes = SIZES[name]

    def missing(share: float) -> float:
        effect, error = difference_of_right(sizes, (KNOWS, share))
        return effect - minimum_detectable_effect(error, len(sizes))

    scores = right_or_wrong(sizes, (KNOWS, optimize.brentq(missing, KNOWS, 1)), seed=2)
    assert interval_of(significant(p_values(scores, images(name))))[1] >= 0.8


@pytest.mark.parametrize("name", ["llava_bench", "pope"])
def test_judged_answers_show_the_stated_effect_in_eighty_percent(name: str) -> None:
    effect = minimum_detectable_effect(error_of_judged(SIZES[name]), len(SIZES[name]))
    scores = judged(SIZES[name], effect, seed=4)
    assert interval_of(significant(p_values(scores, images(name))))[1] >= 0.8
