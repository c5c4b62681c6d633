from itertools import product

import numpy as np
import pytest
from scipy import stats

from vila_ops.eval import significance
from vila_ops.eval.significance import holm, minimum_detectable_effect, paired_test, sign_flip_mid_p
from vila_ops.eval.statistics import FloatArray, UndefinedStatistic


def alone(items: int) -> list[str]:
    return [f"image-{item}" for item in range(items)]


def right_or_wrong(only_first: int, only_second: int, both: int = 3) -> tuple[list[float], list[float]]:
    first = [1.0] * only_first + [0.0] * only_second + [1.0] * both
    second = [0.0] * only_first + [1.0] * only_second + [1.0] * both
    return first, second


def test_mcnemar_against_the_example_of_its_authors() -> None:
    # Fagerland, Lydersen & Laake 2013, Tables 1 and 5: 1 and 7 discordant children of 21, mid-p 0.0391.
    first, second = right_or_wrong(1, 7, both=13)
    test = paired_test(first, second, alone(21), statistic="mean", resamples=1, seed=0)
    assert test.name == "mcnemar_mid_p"
    assert test.p == pytest.approx(0.0391, abs=5e-5)


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [(9, 2, 0.03857421875), (1, 9, 0.01171875), (0, 4, 0.0625), (40, 61, 0.0370667674385605), (5, 5, 0.876953125)],
)
def test_mcnemar_against_statsmodels(only_first: int, only_second: int, p: float) -> None:
    # statsmodels 0.15: mcnemar(exact=True), minus scipy's probability of the counts (half of it at equal counts).
    first, second = right_or_wrong(only_first, only_second)
    test = paired_test(first, second, alone(len(first)), statistic="mean", resamples=1, seed=0)
    assert (test.name, test.p) == ("mcnemar_mid_p", pytest.approx(p, abs=1e-12))


@pytest.mark.parametrize(
    "gaps",
    [[1, 1, 1, -1, 2, 3], [2, 2, -4, 2, 0, 0, 6], [1, -1, 2, -2], [5], [3, 3, 3, 3, 3, 3, 3, 3], [7, 1, -3, 0, 2, 2]],
)
def test_whole_differences_against_all_their_sign_flips(gaps: list[int]) -> None:
    sums = [abs(sum(sign * gap for sign, gap in zip(signs, gaps, strict=True))) for signs in flips(len(gaps))]
    seen = abs(sum(gaps))
    farther, equal = sum(one > seen for one in sums), sum(one == seen for one in sums)
    assert sign_flip_mid_p(np.array(gaps)) == pytest.approx((farther + equal / 2) / len(sums), abs=1e-12)


def test_questions_of_an_image_are_exchanged_together() -> None:
    # Image a speaks for the first with 3 questions, b with 1, c against it with 1: sums of 8 flips are +-5 +-3 +-3 +-1.
    first, second = [1.0, 1.0, 1.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    test = paired_test(first, second, ["a", "a", "a", "b", "c", "c"], statistic="mean", resamples=1, seed=0)
    assert (test.name, test.p) == ("sign_flip_mid_p", pytest.approx((2 + 4 / 2) / 8))


def test_many_whole_differences_against_the_binomial_distribution() -> None:
    gaps = np.repeat([1, -1, 0], [20_150, 19_850, 60_000])
    distribution = stats.binom(40_000, 0.5)
    assert sign_flip_mid_p(gaps) == pytest.approx(2 * distribution.sf(20_150) + distribution.pmf(20_150), abs=1e-9)


def test_no_p_value_is_zero() -> None:
    assert sign_flip_mid_p(np.ones(100_000, dtype=np.int64)) == significance.SMALLEST_MID_P
    values = np.random.default_rng(0).uniform(1, 2, size=100)
    assert paired_test(2 * values, values, alone(100), statistic="mean", resamples=999, seed=0).p == 1 / 1000


def test_a_sampled_test_agrees_with_scipy() -> None:
    rng = np.random.default_rng(5)
    first, second = rng.normal(0.4, size=30), rng.normal(size=30)
    clusters = np.repeat(np.arange(10), 3)
    sums = [np.bincount(clusters, weights=values) for values in (first, second)]
    exact = stats.permutation_test(
        sums, lambda left, right, axis: (left - right).sum(axis=axis), permutation_type="samples", n_resamples=np.inf
    ).pvalue
    test = paired_test(first, second, clusters, statistic="mean", resamples=40_000, seed=0)
    assert (test.name, test.p) == ("sign_flip_sampled", pytest.approx(exact, abs=0.01))
    assert 0.01 < exact < 0.9


@pytest.mark.parametrize("cost", [0, 10**9], ids=["clusters of equal rows", "eight clusters at a time"])
def test_a_ratio_against_all_its_exchanges(cost: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(significance, "_BINOMIAL_COST", cost)
    first = np.array([[2.0, 1.0], [9.0, 3.0], [4.0, 4.0], [4.0, 4.0], [4.0, 4.0], [3.0, 2.0], [5.0, 1.0], [1.0, 1.0]])
    second = np.array([[4.0, 1.0], [8.0, 3.0], [8.0, 4.0], [8.0, 4.0], [8.0, 4.0], [3.0, 2.0], [6.0, 1.0], [1.0, 2.0]])
    differences = []
    for signs in flips(8):
        mine = np.where(np.array(signs)[:, np.newaxis] > 0, first, second).sum(axis=0)
        other = (first + second).sum(axis=0) - mine
        differences.append(abs(mine[0] / mine[1] - other[0] / other[1]))
    # Of the 256 exchanges, the one that changes nothing comes last.
    exact = np.mean(np.array(differences) >= differences[-1] - 1e-12)
    test = paired_test(first, second, alone(8), statistic="ratio", resamples=40_000, seed=1)
    assert (test.name, test.p) == ("sign_flip_sampled", pytest.approx(exact, abs=0.01))
    assert 0.01 < exact < 0.9


@pytest.mark.parametrize("step", [1.0, 0.1], ids=["mid-p", "sampled"])
def test_the_sides_are_interchangeable_and_equal_ones_do_not_differ(step: float) -> None:
    rng = np.random.default_rng(0)
    first, second = rng.integers(11, size=(2, 40)) * step
    clusters = np.repeat(np.arange(20), 2)
    one, other = (
        paired_test(*sides, clusters, statistic="mean", resamples=20_000, seed=2).p
        for sides in ((first, second), (second, first))
    )
    assert one == pytest.approx(other, abs=0.015)
    assert paired_test(first, first, clusters, statistic="mean", resamples=99, seed=0).p == 1


def test_each_image_has_one_vote_in_a_mean_of_means() -> None:
    # Two questions of a count as half each: gaps of 1, 1 and -1 of three images.
    first, second = [1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]
    test = paired_test(first, second, ["a", "a", "b", "c"], statistic="mean_of_means", resamples=1, seed=0)
    assert test.p == pytest.approx((2 + 6 / 2) / 8)  # of 8 sums, two are +-3 and six are +-1


def test_a_test_of_f1_reads_the_counts_of_all_images() -> None:
    def f1(sums: FloatArray) -> FloatArray:
        return 2 * sums[:, 0] / (2 * sums[:, 0] + sums[:, 1])

    rng = np.random.default_rng(0)
    good, bad = (np.stack([hits, 1 - hits], axis=1) for hits in (rng.random((2, 60)) < [[0.9], [0.5]]))
    clusters = np.repeat(np.arange(20), 3)
    assert paired_test(good, bad, clusters, statistic=f1, resamples=9999, seed=0).p < 0.001


def test_a_statistic_without_a_value_is_refused() -> None:
    first, second = [[1.0, 1.0], [2.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]
    with pytest.raises(UndefinedStatistic, match=r"the statistic is 3\.0 and inf"):
        paired_test(first, second, ["a", "b"], statistic="ratio", resamples=9, seed=0)
    second = [[1.0, 0.0], [1.0, 1.0]]
    with pytest.raises(UndefinedStatistic, match=r"undefined on \d+ of 99 resamples"):
        paired_test(first, second, ["a", "b"], statistic="ratio", resamples=99, seed=0)
    with pytest.raises(UndefinedStatistic, match="2 items in 1 clusters"):
        paired_test([1.0, 2.0], [1.0, 1.0], ["a", "a"], statistic="mean", resamples=9, seed=0)


def test_holm_against_statsmodels() -> None:
    # statsmodels 0.15: multipletests(p, method="holm").
    adjusted = holm([0.01, 0.04, 0.03, 0.005, 0.02, 0.5, 0.03])
    assert adjusted == pytest.approx([0.06, 0.12, 0.12, 0.035, 0.1, 0.5, 0.12])
    assert holm([0.7, 0.6]) == [1, 1]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("clusters", "factor"), [(3, 5.653489271601), (10, 3.149634591889), (24, 2.925591691269), (500, 2.806987929038)]
)
def test_the_minimum_detectable_effect_against_statsmodels(clusters: int, factor: float) -> None:
    # statsmodels 0.15: TTestPower().solve_power(nobs=C, alpha=0.05, power=0.8) * sqrt(C).
    assert minimum_detectable_effect(0.02, clusters) == pytest.approx(0.02 * factor, rel=1e-5)


def flips(clusters: int) -> list[tuple[int, ...]]:
    return list(product((-1, 1), repeat=clusters))
