from itertools import product

import numpy as np
import pytest
from scipy import stats

from vila_ops.eval import statistics
from vila_ops.eval.statistics import (
    FloatArray,
    Statistic,
    UndefinedStatistic,
    cluster_bootstrap,
    distinct_rows,
    paired_difference,
)


def singletons(items: int) -> list[str]:
    return [f"object-{item}" for item in range(items)]


def test_three_clusters_against_all_their_draws() -> None:
    # All 27 equally likely draws of three clusters are known, so the quantiles of their means are too.
    values = [0.0, 0.0, 3.0, 9.0]
    clusters = ["a", "a", "b", "c"]
    sums, sizes = {"a": 0.0, "b": 3.0, "c": 9.0}, {"a": 2, "b": 1, "c": 1}
    exact = [sum(sums[name] for name in draw) / sum(sizes[name] for name in draw) for draw in product("abc", repeat=3)]
    interval = cluster_bootstrap(values, clusters, statistic="mean", resamples=20_000, seed=0)
    assert interval.value == 3.0
    assert (interval.low, interval.high) == tuple(np.quantile(exact, [0.025, 0.975], method="inverted_cdf"))
    assert (interval.n, interval.clusters) == (4, 3)


def test_mean_of_means_gives_each_cluster_one_vote() -> None:
    values = [0.0, 0.0, 0.0, 6.0]
    clusters = ["a", "a", "a", "b"]
    assert cluster_bootstrap(values, clusters, statistic="mean", resamples=100, seed=0).value == 1.5
    interval = cluster_bootstrap(values, clusters, statistic="mean_of_means", resamples=1000, seed=0)
    assert (interval.value, interval.low, interval.high) == (3.0, 0.0, 6.0)


def test_ratio_is_of_sums_and_not_of_items() -> None:
    nll_and_tokens = [[10.0, 2.0], [8.0, 8.0], [1.0, 1.0]]
    interval = cluster_bootstrap(nll_and_tokens, ["a", "b", "b"], statistic="ratio", resamples=1000, seed=0)
    assert interval.value == 19 / 11
    assert (interval.low, interval.high) == (1.0, 5.0)  # b drawn twice, a drawn twice


def test_a_statistic_of_sums_is_taken_of_the_columns() -> None:
    def spread(sums: FloatArray) -> FloatArray:
        return sums[:, 0] - sums[:, 1] * sums[:, 2]

    interval = cluster_bootstrap([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], ["a", "b"], statistic=spread, resamples=99, seed=0)
    assert interval.value == 5 - 7 * 9


@pytest.mark.parametrize("statistic", ["mean", "mean_of_means"])
def test_items_that_are_their_own_clusters_agree_with_scipy(statistic: Statistic) -> None:
    values = np.random.default_rng(1).exponential(size=60)
    ours = cluster_bootstrap(values, singletons(60), statistic=statistic, resamples=20_000, seed=2)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=3).confidence_interval
    # The 2.5 % quantile of 20,000 resamples has a standard error of about 0.02 standard errors of the mean.
    tolerance = 0.1 * values.std() / np.sqrt(60)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=tolerance)


def test_a_ratio_agrees_with_scipy() -> None:
    rng = np.random.default_rng(4)
    tokens = rng.integers(3, 30, size=80).astype(np.float64)
    nll = tokens * rng.normal(2.0, 0.5, size=80)
    ours = cluster_bootstrap(
        np.stack([nll, tokens], axis=1), singletons(80), statistic="ratio", resamples=20_000, seed=5
    )
    theirs = stats.bootstrap(
        (nll, tokens),
        lambda left, right, axis: left.sum(axis=axis) / right.sum(axis=axis),
        paired=True,
        n_resamples=20_000,
        method="percentile",
        rng=6,
    ).confidence_interval
    assert ours.value == pytest.approx(nll.sum() / tokens.sum())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.1 * 0.5 / np.sqrt(80))


@pytest.mark.slow
def test_ninety_five_percent_intervals_cover_the_truth_so_often() -> None:
    # 80 objects of three items that share an effect of the object; the true mean is 1.
    clusters = [f"object-{item // 3}" for item in range(240)]
    covered = 0
    for seed in range(1000):
        rng = np.random.default_rng([9, seed])
        values = 1 + np.repeat(rng.normal(size=80), 3) + rng.normal(size=240)
        interval = cluster_bootstrap(values, clusters, statistic="mean", resamples=500, seed=seed)
        covered += interval.low <= 1 <= interval.high
    assert 930 <= covered <= 970


def test_few_clusters_have_the_interval_of_a_t_distribution() -> None:
    values = stats.norm.ppf((np.arange(12) + 0.5) / 12)
    interval = cluster_bootstrap(values, singletons(12), statistic="mean", resamples=50_000, seed=0)
    low, high = stats.t.interval(0.95, 11, loc=values.mean(), scale=stats.sem(values))
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.03 * (high - low))
    plain = np.array(stats.norm.interval(0.95, loc=values.mean(), scale=values.std() / np.sqrt(12)))
    assert interval.high - interval.low > 1.1 * (plain[1] - plain[0]), "the plain percentile interval is too narrow"


def test_the_standard_error_is_that_of_clustered_items() -> None:
    # Miller, arXiv:2411.00640, equation 4, with the factor C / (C - 1) of a cluster-robust variance.
    rng = np.random.default_rng(3)
    clusters = rng.integers(40, size=300)
    values = rng.normal(size=40)[clusters] + rng.normal(size=300)
    residuals = np.bincount(clusters, weights=values - values.mean())
    error = np.sqrt((residuals**2).sum() * 40 / 39) / 300
    interval = cluster_bootstrap(values, clusters, statistic="mean", resamples=20_000, seed=0)
    assert interval.standard_error == pytest.approx(error, rel=0.03)


@pytest.mark.parametrize("cost", [1, 10**9], ids=["rows are counted", "clusters are drawn"])
def test_right_and_wrong_answers_have_the_quantiles_of_a_binomial_distribution(
    cost: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "_COUNT_COST", cost)
    values = np.repeat([1.0, 0.0], [300, 700])
    interval = cluster_bootstrap(values, singletons(1000), statistic="mean", resamples=20_000, seed=0)
    tail = stats.norm.sf(np.sqrt(1000 / 999) * stats.t.isf(0.025, 999))
    low, high = stats.binom.ppf([tail, 1 - tail], 1000, 0.3) / 1000
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.0011)


def test_rows_that_differ_by_rounding_are_one_row() -> None:
    sums = np.array([[0.1 + 0.2, 1.0], [0.3, 1.0], [0.3, 2.0], [0.0, 0.0], [1e9, 1.0], [1e9 + 1, 1.0]])
    rows, counts = distinct_rows(sums)
    assert sorted(counts.tolist()) == [1, 1, 1, 1, 2]
    assert counts @ rows == pytest.approx(sums.sum(axis=0))
    tiny, _ = distinct_rows(np.array([[0.0], [5e-324], [1e-320]]))
    assert sorted(tiny[:, 0].tolist()) == [0.0, 5e-324, 1e-320]
    alike, once = distinct_rows(np.zeros((5, 2)))
    assert (alike.tolist(), once.tolist()) == ([[0.0, 0.0]], [5])


def test_identical_items_of_a_cluster_widen_the_interval() -> None:
    values = np.repeat(np.random.default_rng(0).normal(size=50), 4)
    alone = cluster_bootstrap(values, singletons(200), statistic="mean", resamples=4000, seed=0)
    shared = cluster_bootstrap(
        values, [f"object-{item // 4}" for item in range(200)], statistic="mean", resamples=4000, seed=0
    )
    # Four copies carry the information of one: the width grows by sqrt(4).
    assert (shared.high - shared.low) / (alone.high - alone.low) == pytest.approx(2, abs=0.15)


def test_the_same_seed_gives_the_same_interval_and_another_does_not() -> None:
    values = np.random.default_rng(0).normal(size=30)
    first, second, other = (
        cluster_bootstrap(values, singletons(30), statistic="mean", resamples=200, seed=seed) for seed in (1, 1, 2)
    )
    assert first == second
    assert first != other


def test_the_order_of_the_items_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    values, clusters = rng.normal(size=30), np.repeat([f"object-{i}" for i in range(10)], 3)
    order = rng.permutation(30)
    plain = cluster_bootstrap(values, clusters.tolist(), statistic="mean", resamples=200, seed=1)
    shuffled = cluster_bootstrap(values[order], clusters[order].tolist(), statistic="mean", resamples=200, seed=1)
    assert (shuffled.low, shuffled.high) == pytest.approx((plain.low, plain.high), abs=1e-12)


def test_resampling_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=30)
    whole = cluster_bootstrap(values, singletons(30), statistic="mean", resamples=100, seed=1)
    monkeypatch.setattr(statistics, "_CELLS_AT_ONCE", 30 * 7)
    parts = cluster_bootstrap(values, singletons(30), statistic="mean", resamples=100, seed=1)
    assert (parts.low, parts.high) == pytest.approx((whole.low, whole.high), abs=1e-12)


def test_a_paired_difference_of_means_is_the_mean_difference() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=40), rng.normal(size=40)
    clusters = [f"object-{item // 2}" for item in range(40)]
    paired = paired_difference(first, second, clusters, statistic="mean", resamples=500, seed=3)
    plain = cluster_bootstrap(first - second, clusters, statistic="mean", resamples=500, seed=3)
    assert (paired.value, paired.low, paired.high) == pytest.approx((plain.value, plain.low, plain.high), abs=1e-12)
    assert (paired.n, paired.clusters) == (40, 20)


def test_pairing_takes_out_what_both_sides_share() -> None:
    rng = np.random.default_rng(0)
    hardness = rng.normal(scale=5, size=100)
    first, second = hardness + 0.5 + rng.normal(scale=0.1, size=100), hardness
    interval = paired_difference(first, second, singletons(100), statistic="mean", resamples=1000, seed=0)
    assert 0.4 < interval.low < 0.5 < interval.high < 0.6


def test_a_paired_difference_of_ratios_is_of_the_corpus_values() -> None:
    first = np.array([[2.0, 1.0], [9.0, 3.0], [4.0, 4.0]])
    second = np.array([[4.0, 1.0], [9.0, 3.0], [8.0, 4.0]])
    interval = paired_difference(first, second, ["a", "b", "c"], statistic="ratio", resamples=500, seed=0)
    assert interval.value == pytest.approx(15 / 8 - 21 / 8)
    assert interval.low == pytest.approx(-2)  # a alone
    assert interval.high == pytest.approx(0)  # b alone


def test_equal_sides_differ_by_nothing() -> None:
    values = np.random.default_rng(0).normal(size=20)
    interval = paired_difference(values, values, singletons(20), statistic="mean_of_means", resamples=100, seed=0)
    assert (interval.value, interval.low, interval.high) == (0, 0, 0)


@pytest.mark.parametrize(
    ("values", "clusters", "statistic", "message"),
    [
        ([1.0, 2.0, 3.0], ["a", "b"], "mean", r"shape \(3,\) for 2 items"),
        ([[1.0, 2.0], [1.0, 2.0]], ["a", "b"], "mean", "one number for each item"),
        ([1.0, 2.0], ["a", "b"], "ratio", "numerator and denominator"),
        ([1.0, float("nan")], ["a", "fox"], "mean", "not finite, the first is item 1 of cluster 'fox'"),
        ([1.0, 2.0], ["a", "a"], "mean", "2 items in 1 clusters"),
        ([], [], "mean", "0 items in 0 clusters"),
        ([[1.0, 0.0], [2.0, 0.0]], ["a", "b"], "ratio", "is inf on the 2 items"),
        ([[1.0, 0.0], [2.0, 1.0]], ["a", "b"], "ratio", r"undefined on \d+ of 100 resamples"),
    ],
)
def test_what_has_no_interval_is_refused(
    values: list[float], clusters: list[str], statistic: Statistic, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        cluster_bootstrap(values, clusters, statistic=statistic, resamples=100, seed=0)
    undefined = any(word in message for word in ("1 clusters", "0 clusters", "is inf", "undefined"))
    assert isinstance(caught.value, UndefinedStatistic) == undefined


def test_sides_of_different_columns_are_refused() -> None:
    def total(sums: FloatArray) -> FloatArray:
        return sums[:, 0] + sums[:, -1]

    with pytest.raises(ValueError, match="first has 1 columns and second 2"):
        paired_difference([1.0, 2.0], [[1.0, 1.0], [2.0, 2.0]], ["a", "b"], statistic=total, resamples=9, seed=0)
