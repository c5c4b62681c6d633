"""A decision names the rule that decided, with its numbers, and what would have to change."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from vila_ops.config.retrain import RetrainPolicy
from vila_ops.retrain.decide import Decided, Evidence, PlannedCost, Spent, decide
from vila_ops.retrain.deliveries import DeliveryCounts, refusal
from vila_ops.retrain.drift import Drift
from vila_ops.retrain.feedback import ErrorSlice

NOW = datetime(2026, 12, 1, tzinfo=UTC)
POLICY = RetrainPolicy.model_validate(
    {
        "watch": {"inbox": {"kind": "jsonl", "path": "inbox", "render": "caption"}},
        "stage": "sft",
        "replay": 0.5,
        "new_samples": 100,
        "min_new_samples": 20,
        "cool_down_hours": 48,
        "budget": {"hours": 10, "cost": 100},
        "feedback": {},
    }
)
DRIFT = Drift(
    stream="traffic, images", before=200, now=100, mmd2=0.2, p_value=0.001, level=0.005, effect=0.1, psi=0.4,
    psi_by_chance=0.1, drifted=True,
)  # fmt: skip
SLICE = ErrorSlice(name="with an image", rated=40, bad=30, p_value=1e-6, exceeds=True)


def evidence(new: int, **changes: Any) -> Evidence:
    """The evidence of so many new samples, which all rules but the first pass."""
    delivery = DeliveryCounts(name="zz.inbox.1", digest="d", status="new", records=new, train_samples=new)
    values: dict[str, Any] = {
        "champion": 3, "model": "m", "deliveries": (delivery,), "estimate": PlannedCost(hours=2, cost=20),
        "spent": Spent(hours=1, cost=10, last=NOW - timedelta(hours=48)),
    }  # fmt: skip
    return Evidence.model_validate({**values, **changes})


def decided(new: int, **changes: Any) -> Decided:
    return decide(POLICY, evidence(new, **changes), when=NOW)


@pytest.mark.parametrize(
    ("new", "changes", "rule"),
    [(100, {}, "new data"), (20, {"drift": (DRIFT,)}, "drift"), (20, {"slices": (SLICE,)}, "errors")],
)
def test_each_reason_retrains(new: int, changes: dict[str, Any], rule: str) -> None:
    made = decided(new, **changes)
    assert (made.verdict, made.rule, made.change) == ("retrain", rule, "")
    assert all(one.holds for one in made.checks if one.rule not in ("new data", "drift", "errors"))


@pytest.mark.parametrize(
    ("new", "changes", "rule", "change"),
    [
        (99, {}, "no reason", "1 more usable samples; or a drift"),
        (19, {"drift": (DRIFT,)}, "enough data", "1 more usable samples"),
        (100, {"champion": None}, "champion", "run the whole recipe once"),
        (100, {"spent": Spent(last=NOW - timedelta(hours=47))}, "cool-down", "wait until 2026-12-01T01:00:00"),
        (100, {"spent": Spent(hours=8.1)}, "budget of hours", "a budget.hours of 10.1"),
        (100, {"spent": Spent(cost=80.5)}, "budget of cost", "a budget.cost of 100"),
        (
            100,
            {"estimate": PlannedCost(hours=None, cost=None)},
            "budget of hours",
            "set train.accelerator in the resources",
        ),
    ],
)
def test_each_refusal_says_what_would_have_to_change(new: int, changes: dict[str, Any], rule: str, change: str) -> None:
    made = decided(new, **changes)
    assert (made.verdict, made.rule) == ("not now", rule)
    assert change in made.change


def test_a_drift_of_too_small_an_effect_is_no_reason() -> None:
    weak = DRIFT.with_changes({"drifted": False, "effect": 0.004})
    made = decided(50, drift=(weak,))
    assert made.rule == "no reason"
    assert "traffic, images did not drift: p 0.001 at level 0.005, effect 0.004" in made.reason


@pytest.mark.parametrize(
    ("counts", "begins"),
    [
        ({"records": 100, "train_samples": 80}, ""),
        ({"records": 100, "bad": 5, "train_samples": 80}, ""),
        ({"records": 100, "bad": 6, "train_samples": 80}, "broken: 6 of 100 records cannot be read"),
        ({"records": 100, "leaking": 1, "train_samples": 80}, "leaking: 1 of 100 records overlap with held-out"),
        ({"records": 100, "duplicates": 51, "train_samples": 49}, "duplicated: 51 of 100 records repeat"),
        ({"records": 100, "duplicates": 50, "train_samples": 0}, "empty: nothing is left"),
    ],
)
def test_a_delivery_is_refused_as_a_whole(counts: dict[str, int], begins: str) -> None:
    made = refusal(DeliveryCounts(name="zz.inbox.1", digest="d", status="new", **counts), POLICY.quality)
    assert made.startswith(begins)
    assert bool(made) == bool(begins)


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(ValueError, match="min_new_samples 101 exceeds new_samples 100"):
        POLICY.with_changes({"min_new_samples": 101})
    weighted = {"kind": "jsonl", "path": "inbox", "render": "caption", "weight": 2}
    with pytest.raises(ValueError, match="`replay` gives"):
        POLICY.with_changes({"watch": {"inbox": weighted}})
