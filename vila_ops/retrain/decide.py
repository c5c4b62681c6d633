"""Whether to retrain: a pure function of the policy and of the evidence. The first rule that does not hold decides."""

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Literal

from vila_ops.config import Config
from vila_ops.config.retrain import RetrainPolicy
from vila_ops.retrain.deliveries import DeliveryCounts
from vila_ops.retrain.drift import Drift
from vila_ops.retrain.feedback import ErrorSlice

Verdict = Literal["retrain", "not now", "passed", "refused", "started", "promoted"]
"""Of a look (the first two), of a gate (passed, refused), and of a canary (started, promoted, refused, not now)."""


class PlannedCost(Config):
    """What a retraining takes, by the planner or by the time of a stage like it."""

    hours: float | None
    """None where the resources name no accelerator, and no stage of the same parts was timed."""
    cost: float | None
    """None where its price is not known."""


class Spent(Config):
    """What earlier retrainings took within the budget's period, by the planner's estimates."""

    hours: float = 0.0
    cost: float = 0.0
    last: datetime | None = None
    """Time of the last decision to retrain, of any period."""


class Evidence(Config):
    """The numbers that a decision rests on."""

    spent: Spent
    champion: int | None = None
    """Version of the champion; None: there is none, and nothing else was measured."""
    model: str | None = None
    """Digest of the champion."""
    deliveries: tuple[DeliveryCounts, ...] = ()
    drift: tuple[Drift, ...] = ()
    slices: tuple[ErrorSlice, ...] = ()
    estimate: PlannedCost | None = None
    """None where there is nothing new to train on."""
    notes: tuple[str, ...] = ()
    """What could not be measured, and why."""

    def new_samples(self) -> int:
        """Usable new training samples."""
        return sum(one.train_samples for one in self.deliveries if one.status == "new")


class RuleCheck(Config):
    """One rule of a decision."""

    rule: str
    holds: bool
    reason: str
    """A sentence with the numbers."""
    change: str = ""
    """What would have to change for it to hold."""


class Decided(Config):
    """What was decided, and by which rule."""

    verdict: Verdict
    rule: str
    reason: str
    change: str
    """What would have to change for another verdict; empty for `retrain`."""
    checks: tuple[RuleCheck, ...]
    """Every rule, those that did not decide too."""


def decide(policy: RetrainPolicy, evidence: Evidence, *, when: datetime) -> Decided:
    """Retrain where there is a reason (new data, drift, errors, in this order) and nothing speaks against it."""
    reasons = list(_reasons(policy, evidence))
    conditions = list(_conditions(policy, evidence, when))
    checks = (*reasons, *conditions)
    asking = [one for one in reasons if one.holds]
    failing = [one for one in conditions if not one.holds]
    if evidence.champion is not None and not asking:
        told = "; ".join(one.reason for one in reasons)
        change = "; or ".join(one.change for one in reasons if one.change)
        return Decided(verdict="not now", rule="no reason", reason=told, change=change, checks=checks)
    if failing:
        first = failing[0]
        return Decided(verdict="not now", rule=first.rule, reason=first.reason, change=first.change, checks=checks)
    return Decided(verdict="retrain", rule=asking[0].rule, reason=asking[0].reason, change="", checks=checks)


def _reasons(policy: RetrainPolicy, evidence: Evidence) -> Iterator[RuleCheck]:
    new = evidence.new_samples()
    used = [one.name for one in evidence.deliveries if one.status == "new"]
    refused = [f"{one.name} ({one.reason})" for one in evidence.deliveries if one.status in ("refused", "set aside")]
    yield RuleCheck(
        rule="new data",
        holds=new >= policy.new_samples,
        reason=f"{new} usable new training samples in {len(used)} deliveries, new_samples is {policy.new_samples}"
        + (f"; not used: {'; '.join(refused)}" if refused else ""),
        change=f"{policy.new_samples - new} more usable samples" if new < policy.new_samples else "",
    )
    drifted = [one for one in evidence.drift if one.drifted]
    shown = drifted or sorted(evidence.drift, key=lambda one: one.p_value)[:1]
    yield RuleCheck(
        rule="drift",
        holds=bool(drifted),
        reason="; ".join(_told(one) for one in shown) or "no stream of embeddings was compared",
        change="" if drifted or policy.drift is None else "a drift of embeddings",
    )
    bad = [one for one in evidence.slices if one.exceeds]
    named = bad or [one for one in evidence.slices if one.name == "all"]
    rated = (f"{one.name}: {one.bad} of {one.rated} rated answers are bad (p {one.p_value:.3g})" for one in named)
    yield RuleCheck(
        rule="errors",
        holds=bool(bad),
        reason="; ".join(rated) or "no answer of the champion was rated",
        change="" if bad or policy.feedback is None else "ratings that surely exceed feedback.max_bad_share",
    )


def _told(one: Drift) -> str:
    return (
        f"{one.stream} {'drifted' if one.drifted else 'did not drift'}: p {one.p_value:.3g} at level {one.level:.3g}, "
        f"effect {one.effect:.3g}, PSI {one.psi:.3g} ({one.psi_by_chance:.3g} by chance), {one.before} units before, "
        f"{one.now} now"
    )


def _conditions(policy: RetrainPolicy, evidence: Evidence, when: datetime) -> Iterator[RuleCheck]:
    yield RuleCheck(
        rule="champion",
        holds=evidence.champion is not None,
        reason="there is no champion to go on from" if evidence.champion is None else f"version {evidence.champion}",
        change="run the whole recipe once, so that a model passes the gate" if evidence.champion is None else "",
    )
    new, fewest = evidence.new_samples(), policy.min_new_samples
    yield RuleCheck(
        rule="enough data",
        holds=new >= fewest,
        reason=f"{new} usable new training samples, min_new_samples is {fewest}",
        change=f"{fewest - new} more usable samples" if new < fewest else "",
    )
    yield _cool_down(policy, evidence.spent, when)
    if evidence.estimate is not None:
        for unit in ("hours", "cost"):
            yield _within(policy, evidence, unit)


def _cool_down(policy: RetrainPolicy, spent: Spent, when: datetime) -> RuleCheck:
    if spent.last is None:
        return RuleCheck(rule="cool-down", holds=True, reason="there was no retraining yet")
    free = spent.last + timedelta(hours=policy.cool_down_hours)
    holds = when >= free
    return RuleCheck(
        rule="cool-down",
        holds=holds,
        reason=f"the last retraining was decided at {spent.last.isoformat(timespec='seconds')}, cool_down_hours is "
        f"{policy.cool_down_hours:g}",
        change="" if holds else f"wait until {free.isoformat(timespec='seconds')}",
    )


def _within(policy: RetrainPolicy, evidence: Evidence, unit: Literal["hours", "cost"]) -> RuleCheck:
    limit: float | None = getattr(policy.budget, unit)
    asked: float | None = getattr(evidence.estimate, unit)
    spent: float = getattr(evidence.spent, unit)
    rule = f"budget of {unit}"
    if limit is None:
        return RuleCheck(rule=rule, holds=True, reason=f"budget.{unit} is not set")
    if asked is None:
        named = "train.accelerator" if unit == "hours" else "train.accelerator with its price_per_hour"
        reason = f"budget.{unit} is {limit:g}, but the planner cannot say what a retraining takes"
        change = f"set {named} in the resources, or budget.{unit} to null"
        return RuleCheck(rule=rule, holds=False, reason=reason, change=change)
    holds = spent + asked <= limit
    return RuleCheck(
        rule=rule,
        holds=holds,
        reason=f"{asked:.3g} {unit} for this one and {spent:.3g} of the last {policy.budget.days:g} days, "
        f"budget.{unit} is {limit:g}",
        change="" if holds else f"a budget.{unit} of {spent + asked:.3g}, fewer steps, or wait until less was spent",
    )
