from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vila_ops.eval.compare import Comparison, NotComparable, ScoreTable, compare, disagreements
from vila_ops.eval.significance import holm, minimum_detectable_effect, paired_test
from vila_ops.eval.statistics import PER_TOKEN, FloatArray, paired_difference


def table(
    scores: Sequence[float] | FloatArray,
    *,
    groups: Sequence[str] | None = None,
    slices: Sequence[tuple[str, ...]] | None = None,
    **more: Any,
) -> ScoreTable:
    count = len(scores)
    return ScoreTable(
        items=tuple(f"item-{row}" for row in range(count)),
        groups=tuple(groups or [f"image-{row // 2}" for row in range(count)]),
        slices=tuple(slices or [()] * count),
        values=np.asarray(scores, dtype=np.float64),
        **more,
    )


def shuffled(one: ScoreTable, seed: int) -> ScoreTable:
    order = np.random.default_rng(seed).permutation(len(one.items))
    return replace(
        one,
        items=tuple(one.items[row] for row in order),
        groups=tuple(one.groups[row] for row in order),
        slices=tuple(one.slices[row] for row in order),
        values=one.values[order],
    )


def compared(**models: ScoreTable | Mapping[str, Mapping[str, ScoreTable]]) -> Comparison:
    suites = {
        name: {"bench": {"accuracy": one}} if isinstance(one, ScoreTable) else one for name, one in models.items()
    }
    return compare(suites, resamples=500, seed=3)


def test_a_comparison_by_hand() -> None:
    # Images a, b, c with differences of 2, 1 and -1 right answers in 6 items.
    groups = ["a", "a", "b", "b", "c", "c"]
    slices = [("colour",), ("colour", "count"), ("count",), ("colour",), (), ("colour",)]
    old = table([0, 0, 0, 1, 1, 1], groups=groups, slices=slices)
    new = table([1, 1, 1, 1, 0, 1], groups=groups, slices=slices)
    comparison = compared(old=old, new=new)
    assert (comparison.baseline, comparison.candidates) == ("old", ("new",))
    [metric] = comparison.metrics
    assert (metric.benchmark, metric.metric, metric.candidate) == ("bench", "accuracy", "new")
    overall = metric.overall
    assert (overall.n, overall.groups, overall.baseline, overall.candidate) == (6, 3, 3 / 6, 5 / 6)
    assert overall.value == pytest.approx(2 / 6)
    assert overall.low == pytest.approx(-1 / 2)  # image c thrice
    assert overall.high == pytest.approx(1)  # image a thrice
    # Sums of the 8 sign flips of 2, 1, 1: 4, 2, 2, 0 and their negatives; that of the scores is 2.
    assert (metric.test, metric.p) == ("sign_flip_mid_p", pytest.approx((2 + 4 / 2) / 8))
    assert metric.p_holm == metric.p
    assert metric.disagreements == 4
    colour, count = metric.slices["colour"], metric.slices["count"]
    assert (colour.n, colour.groups, colour.baseline, colour.candidate) == (4, 3, 2 / 4, 1)
    assert (count.n, count.groups, count.baseline, count.candidate, count.value) == (2, 2, 0, 1, 1)
    assert metric.skipped_slices == {}


def test_the_numbers_are_those_of_the_statistics() -> None:
    rng = np.random.default_rng(0)
    scores = rng.random((3, 40))
    clusters = [f"image-{row // 2}" for row in range(40)]
    comparison = compared(a=table(scores[0]), b=table(scores[1]), c=table(scores[2]))
    assert [metric.candidate for metric in comparison.metrics] == ["b", "c"]
    for metric, candidate in zip(comparison.metrics, scores[1:], strict=True):
        sides = candidate, scores[0], clusters
        interval = paired_difference(*sides, statistic="mean", resamples=500, seed=3)
        test = paired_test(*sides, statistic="mean", resamples=500, seed=3)
        overall = metric.overall
        assert (overall.value, overall.low, overall.high) == pytest.approx(
            (interval.value, interval.low, interval.high)
        )
        assert (metric.test, metric.p) == (test.name, test.p)
        assert metric.detectable == pytest.approx(minimum_detectable_effect(interval.standard_error, 20))
    assert [metric.p_holm for metric in comparison.metrics] == holm([metric.p for metric in comparison.metrics])


def test_holm_counts_every_metric_benchmark_and_candidate() -> None:
    rng = np.random.default_rng(1)

    def suite(shift: float) -> dict[str, dict[str, ScoreTable]]:
        return {name: {"accuracy": table(rng.normal(shift, size=60))} for name in ("gqa", "pope", "mmlu")}

    comparison = compared(a=suite(0), b=suite(0.6), c=suite(0))
    assert [(metric.benchmark, metric.candidate) for metric in comparison.metrics] == [
        *(("gqa", "b"), ("gqa", "c"), ("pope", "b"), ("pope", "c"), ("mmlu", "b"), ("mmlu", "c"))
    ]
    smallest = min(comparison.metrics, key=lambda metric: metric.p)
    assert smallest.p_holm == pytest.approx(6 * smallest.p)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_items_are_paired_by_name_in_whatever_order(seed: int) -> None:
    rng = np.random.default_rng(7)
    slices = [("even",) if row % 2 else ("odd", "all") for row in range(30)]
    old, new = (table(rng.integers(2, size=30), slices=slices) for _ in range(2))
    assert compared(old=old, new=shuffled(new, seed)) == compared(old=old, new=new)
    assert disagreements(old, shuffled(new, seed)) == disagreements(old, new)


def test_equal_models_do_not_differ() -> None:
    one = table([1, 0, 1, 1, 0, 0], slices=[("a",)] * 6)
    [metric] = compared(old=one, new=one).metrics
    assert (metric.overall.value, metric.overall.low, metric.overall.high) == (0, 0, 0)
    assert (metric.p, metric.p_holm, metric.disagreements, metric.detectable) == (1, 1, 0, 0)
    assert disagreements(one, one) == ()


def test_statistics_of_several_columns_are_compared() -> None:
    def f1(sums: FloatArray) -> FloatArray:
        return 2 * sums[:, 0] / (2 * sums[:, 0] + sums[:, 1])

    counts = {"old": [[1, 0], [0, 1], [1, 0], [0, 2]], "new": [[1, 0], [1, 0], [1, 0], [0, 1]]}
    nats = {"old": [[4, 1], [6, 3], [2, 2], [5, 4]], "new": [[3, 1], [6, 3], [1, 2], [5, 4]]}
    groups = ["1", "2", "3", "4"]
    models = {
        name: {
            "bench": {
                "f1": table(counts[name], groups=groups, statistic=f1),
                "loss": table(nats[name], groups=groups, statistic="ratio", lower_is_better=True, unit=PER_TOKEN),
            }
        }
        for name in counts
    }
    by_f1, by_loss = compared(**models).metrics
    assert (by_f1.overall.baseline, by_f1.overall.candidate) == pytest.approx((4 / 7, 6 / 7))
    assert (by_f1.disagreements, by_f1.lower_is_better, by_f1.test) == (2, False, "sign_flip_sampled")
    assert (by_loss.overall.baseline, by_loss.overall.candidate) == pytest.approx((1.7, 1.5))
    assert (by_loss.disagreements, by_loss.lower_is_better) == (2, True)
    assert (by_f1.unit, by_loss.unit) == ("share", "nats per token")
    losses = [models[name]["bench"]["loss"] for name in ("old", "new")]
    assert [(one.item, one.baseline, one.candidate) for one in disagreements(*losses)] == [
        ("item-0", (4.0, 1.0), (3.0, 1.0)),
        ("item-2", (2.0, 2.0), (1.0, 2.0)),
    ]


def test_disagreements_start_with_the_largest() -> None:
    old, new = table([0.0, 0.5, 1.0, 0.2, 0.0]), table([0.1, 0.5, 0.0, 0.9, 1.0])
    rows = disagreements(old, new)
    assert [row.item for row in rows] == ["item-2", "item-4", "item-3", "item-0"]
    assert (rows[0].group, rows[0].baseline, rows[0].candidate) == ("image-1", (1.0,), (0.0,))


def test_a_slice_without_an_interval_is_named_with_the_reason() -> None:
    slices = [("one image",), ("one image",), ("two",), (), ("two",), ()]
    ratio = [[1.0, 1.0]] * 2 + [[1.0, 0.0], [1.0, 1.0], [1.0, 0.0], [2.0, 1.0]]
    old = table(np.array(ratio), slices=slices, statistic="ratio")
    [metric] = compared(old=old, new=old).metrics
    assert metric.slices == {}
    assert metric.skipped_slices == {
        "one image": "2 items in 1 clusters; an interval needs at least two clusters",
        "two": "the statistic is nan on the 2 items; look for denominators that sum to 0",
    }


def test_a_metric_without_an_interval_is_refused_by_name() -> None:
    one = table([1, 0, 1], groups=["a", "a", "a"])
    with pytest.raises(NotComparable, match="accuracy of new: 3 items in 1 clusters"):
        compared(old=one, new=one)


BASE = table([1.0, 0.0, 1.0, 0.0], references={"item-0": "a", "item-1": "b"})
TWO_COLUMNS = np.array([[1.0, 1.0]] * 4)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (table([1.0, 0.0, 1.0]), "differ in 1 items, one is 'item-3'"),
        (table([1.0, 0.0, 1.0, 0.0, 1.0]), "differ in 1 items, one is 'item-4'"),
        (replace(BASE, groups=("image-0", "image-0", "image-1", "x")), "'item-3' is of group .* but of 'x'"),
        (replace(BASE, slices=(("a",), (), (), ())), r"'item-0' is of group .*\('a',\) for the candidate"),
        (replace(BASE, values=TWO_COLUMNS), "differ in statistic, number of columns"),
        (replace(BASE, lower_is_better=True), "differ in statistic, number of columns, unit or direction"),
        (replace(BASE, unit="points"), "differ in statistic, number of columns, unit or direction"),
        (replace(BASE, references={"item-0": "a", "item-1": "x"}), "1 items are scored by other references.*'item-1'"),
        (replace(BASE, references={"item-0": "a"}), "differ in 1 items, one is 'item-1'"),
    ],
    ids=[
        "fewer items",
        "more items",
        "groups",
        "slices",
        "columns",
        "direction",
        "unit",
        "references",
        "fewer references",
    ],
)
def test_tables_that_measure_something_else_are_refused(other: ScoreTable, message: str) -> None:
    with pytest.raises(NotComparable, match=message):
        compared(old=BASE, new=other)


def test_nats_per_token_of_two_tokenizers_are_refused() -> None:
    old = table(TWO_COLUMNS, statistic="ratio", unit=PER_TOKEN)
    new = replace(old, values=np.array([[1.0, 1.0], [1.0, 3.0], [1.0, 1.0], [1.0, 2.0]]))
    with pytest.raises(NotComparable, match="2 items have other numbers of tokens, such as 'item-1' with 1 and 3"):
        compared(old=old, new=new)
    assert compared(old=replace(old, unit="share"), new=replace(new, unit="share")).metrics


def test_what_only_one_model_was_measured_on_is_named_and_the_rest_compared() -> None:
    old = {"gqa": {"gqa": BASE, "gqa_official": BASE}, "pope": {"pope": BASE}, "mme": {"mme": table([1.0])}}
    new = {"gqa": {"gqa": BASE, "gqa_answered": BASE}, "vqav2": {"vqav2": BASE}, "mme": {"mme": table([1.0])}}
    comparison = compared(old=old, new=new)
    assert [(one.benchmark, one.metric) for one in comparison.metrics] == [("gqa", "gqa")]
    assert [(one.benchmark, one.metric, one.reason.split(";")[0]) for one in comparison.left_out] == [
        ("gqa", "gqa_official", "the candidate has no such metric"),
        ("pope", None, "the candidate was not measured on it"),
        ("mme", "mme", "1 items in 1 clusters"),
        ("gqa", "gqa_answered", "the baseline has no such metric"),
        ("vqav2", None, "the baseline was not measured on it"),
    ]
    third = compared(old={"gqa": {"gqa": BASE}}, new={"gqa": {"gqa": BASE}}, other=new)
    assert [(one.candidate, one.metric) for one in third.metrics] == [("new", "gqa"), ("other", "gqa")]
    assert {one.candidate for one in third.left_out} == {"other"}


def test_models_without_a_common_benchmark_and_a_single_one_are_refused() -> None:
    with pytest.raises(NotComparable, match="old and new have nothing in common: gqa of new: the candidate was not"):
        compared(old={"gqa": {"gqa": BASE}}, new={"mme": {"mme": BASE}})
    with pytest.raises(ValueError, match=r"1 models are given \(old\)"):
        compared(old=BASE)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"items": ("x", "y", "x", "z")}, "item 'x' is given 2 times"),
        ({"groups": ("a", "b")}, "4 items, 2 groups, 4 rows of slices and 4 scores"),
        ({"slices": ((), ())}, "4 items, 4 groups, 2 rows of slices and 4 scores"),
        ({"values": np.ones(3)}, "4 rows of slices and 3 scores"),
        ({"values": np.array([1, np.nan, np.inf, 0])}, "2 items have no finite score, the first is 'item-1'"),
        ({"values": np.array([[1, 1]] * 3 + [[1, np.nan]])}, "1 items have no finite score, the first is 'item-3'"),
    ],
)
def test_a_table_with_a_fault_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(BASE, **fields)
