"""What a grid shows: intervals against scipy's, and the verdicts on claims by hand."""

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from vila_ops.ablate.verdicts import grid_result, over_seeds
from vila_ops.config.grid import Grid
from vila_ops.eval.compare import NotComparable, ScoreTable

SEEDS = 4
ITEMS = 40


def grid(**changes: object) -> Grid:
    """Two cells by one metric."""
    claims = [{"says": "b is better", "cell": "b", "than": "a", "metric": "accuracy", "by": 0.1}]
    cells: dict[str, object] = {"a": {}, "b": {}}
    tree = {"name": "g", "title": "G", "cells": cells, "seeds": range(SEEDS), "metrics": ["accuracy"], "claims": claims}
    return Grid.model_validate({**tree, "resamples": 4000, **changes})


def table(values: Sequence[float] | NDArray[np.float64], *, lower_is_better: bool = False) -> ScoreTable:
    """One score for each item, each item a group of its own."""
    names = tuple(str(number) for number in range(len(values)))
    return ScoreTable(
        items=names,
        groups=names,
        slices=((),) * len(names),
        values=np.asarray(values, dtype=np.float64),
        lower_is_better=lower_is_better,
    )


def constant(*values: float) -> list[ScoreTable]:
    """A table for each seed, in which every item has the same score."""
    return [table([value] * ITEMS) for value in values]


def test_where_only_seeds_vary_the_interval_is_student_s_over_seeds() -> None:
    values = (0.4, 0.5, 0.55, 0.47)
    result = grid_result(grid(), {"accuracy": {"a": constant(0, 0, 0, 0), "b": constant(*values)}})
    for estimate in (result.metrics[0].values["b"], result.metrics[0].differences["b"]):
        low, high = stats.t.interval(0.95, SEEDS - 1, loc=np.mean(values), scale=stats.sem(values))
        assert (estimate.low, estimate.high) == pytest.approx((low, high), rel=1e-9)
        assert estimate.by_seed == pytest.approx(values)


def test_where_only_items_vary_the_interval_is_student_s_over_items() -> None:
    draw = np.random.default_rng(0)
    scores = draw.normal(size=ITEMS)
    result = grid_result(grid(), {"accuracy": {"a": [table(np.zeros(ITEMS))] * SEEDS, "b": [table(scores)] * SEEDS}})
    low, high = stats.t.interval(0.95, ITEMS - 1, loc=scores.mean(), scale=stats.sem(scores))
    estimate = result.metrics[0].differences["b"]
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=0.02)  # the bootstrap's error in 4,000 draws


def test_what_a_seed_does_to_both_cells_cancels() -> None:
    result = grid_result(grid(), {"accuracy": {"a": constant(0.1, 0.5, 0.3, 0.2), "b": constant(0.3, 0.7, 0.5, 0.4)}})
    difference = result.metrics[0].differences["b"]
    assert (difference.low, difference.value, difference.high) == pytest.approx((0.2, 0.2, 0.2))
    values = result.metrics[0].values["b"]
    assert values.low < 0.3 < 0.7 < values.high


@pytest.mark.parametrize(
    ("b", "verdict"),
    [
        ((0.5, 0.5, 0.5, 0.5), "shown"),
        ((0.05, 0.05, 0.05, 0.05), "not shown"),  # better, but not by more than 0.1
        ((-0.9, 0.9, 0.5, 0.3), "not shown"),  # the interval holds 0
        ((-0.5, -0.5, -0.5, -0.5), "contradicted"),
    ],
)
def test_the_verdict_follows_the_rule_of_the_claim(b: tuple[float, ...], verdict: str) -> None:
    scores = {"accuracy": {"a": constant(0, 0, 0, 0), "b": constant(*b)}}
    assert grid_result(grid(), scores).claims[0].verdict == verdict


@pytest.mark.parametrize(
    ("b", "verdict"),
    [
        ((0.5, 0.5, 0.5, 0.5), "shown"),
        ((-0.05, -0.05, -0.05, -0.05), "shown"),  # worse, but not by more than 0.1
        ((-0.3, 0.1, -0.2, 0.1), "not shown"),  # the interval holds -0.1
        ((-0.2, -0.2, -0.2, -0.2), "contradicted"),
    ],
)
def test_a_claim_below_0_is_that_a_cell_is_not_worse(b: tuple[float, ...], verdict: str) -> None:
    claim = {"says": "b is not worse", "cell": "b", "than": "a", "metric": "accuracy", "by": -0.1}
    scores = {"accuracy": {"a": constant(0, 0, 0, 0), "b": constant(*b)}}
    (one,) = grid_result(grid(claims=[claim]), scores).claims
    assert one.verdict == verdict
    assert one.claim.compared() == "b over a, not worse by more than 0.1"


THREE = {"a": (0.1, 0.2, 0.1, 0.2), "b": (0.6, 0.8, 0.5, 0.7), "c": (0.7, 0.8, 0.8, 0.9)}
"""By cell, the value of each seed."""


@pytest.mark.parametrize("lower_is_better", [False, True])
def test_one_difference_may_be_claimed_to_exceed_another_one(lower_is_better: bool) -> None:
    claim = {"says": "the first step counts more", "cell": "b", "than": "a", "over": ["c", "b"], "metric": "accuracy"}
    sign = -1 if lower_is_better else 1
    tables = {
        cell: [table([sign * value] * ITEMS, lower_is_better=lower_is_better) for value in values]
        for cell, values in THREE.items()
    }
    cells: dict[str, object] = {cell: {} for cell in THREE}
    (one,) = grid_result(grid(cells=cells, claims=[claim]), {"accuracy": tables}).claims
    by_seed = [0.5 - 0.1, 0.6 - 0.0, 0.4 - 0.3, 0.5 - 0.2]  # (b - a) - (c - b)
    assert one.advantage.by_seed == pytest.approx(by_seed)
    low, high = stats.t.interval(0.95, SEEDS - 1, loc=np.mean(by_seed), scale=stats.sem(by_seed))
    assert (one.advantage.low, one.advantage.value, one.advantage.high) == pytest.approx((low, 0.35, high))
    assert (one.verdict, low > 0) == ("shown", True)
    assert one.claim.compared() == "b over a more than c over b"


def test_what_an_item_does_to_all_cells_cancels_in_the_difference_of_differences() -> None:
    """The item's own part is in each cell once: 0.5 for all items is left."""
    draw = np.random.default_rng(0)
    items, other = draw.normal(size=ITEMS), draw.normal(size=ITEMS)
    claim = {"says": "?", "cell": "b", "than": "a", "over": ["d", "c"], "metric": "accuracy"}
    values = {"a": items, "b": items + 1.0, "c": items + other, "d": items + other + 0.5}
    tables = {cell: [table(of)] * SEEDS for cell, of in values.items()}
    (one,) = grid_result(grid(cells={cell: {} for cell in values}, claims=[claim]), {"accuracy": tables}).claims
    assert (one.advantage.low, one.advantage.high) == pytest.approx((0.5, 0.5))


def test_the_interval_over_seeds_alone_is_student_s() -> None:
    values = (0.4, 0.5, 0.55)
    estimate = over_seeds(values)
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert (estimate.low, estimate.value, estimate.high) == pytest.approx((low, np.mean(values), high))


def test_less_is_better_for_a_loss() -> None:
    tables = {cell: [table([value] * ITEMS, lower_is_better=True)] * SEEDS for cell, value in (("a", 3.0), ("b", 2.0))}
    claim = grid_result(grid(), {"accuracy": tables}).claims[0]
    assert claim.verdict == "shown"
    assert claim.advantage.value == pytest.approx(1.0)


def test_cells_with_different_items_are_refused() -> None:
    tables = {"a": constant(0, 0, 0, 0), "b": [table([0.0] * (ITEMS - 1))] * SEEDS}
    with pytest.raises(NotComparable):
        grid_result(grid(), {"accuracy": tables})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seeds": [0]}, "give two or more"),
        ({"seeds": [1, 1]}, "each once"),
        ({"cells": {"a": {}}}, "at least 2"),
        ({"claims": [{"says": "?", "cell": "bb", "than": "a", "metric": "accuracy"}]}, "did you mean 'b'"),
        ({"claims": [{"says": "?", "cell": "b", "than": "a", "metric": "loss"}]}, "not one of metrics"),
        (
            {"claims": [{"says": "?", "cell": "b", "than": "a", "over": ["b", "aa"], "metric": "accuracy"}]},
            "names cell 'aa'",
        ),
    ],
)
def test_a_grid_that_decides_nothing_is_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        grid(**changes)
