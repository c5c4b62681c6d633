"""The evidence for a decision about retraining, measured from the store, the watched places and the service."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from vila_ops.artifacts.kinds import Checkpoint, Dataset, ModelVersion
from vila_ops.artifacts.listing import of_digest
from vila_ops.artifacts.store import file, manifest_of, store_of
from vila_ops.config import NO_CONTEXT, Mixture, Recipe, Run, RunContext, Source, TextFormat
from vila_ops.config.retrain import RetrainPolicy
from vila_ops.data.preprocess.prepare import prepare
from vila_ops.data.preprocess.summary import SUMMARY
from vila_ops.data.shards import index_of
from vila_ops.errors import did_you_mean
from vila_ops.registry import alias_register
from vila_ops.registry.aliases import CHAMPION
from vila_ops.retrain import decisions
from vila_ops.retrain.decide import Evidence, PlannedCost
from vila_ops.retrain.deliveries import (
    PREFIX,
    Delivery,
    DeliveryCounts,
    candidates,
    counts_of,
    listed,
    plain,
    prepared,
    training_mixture,
    unread,
)
from vila_ops.retrain.drift import FEWEST, Drift, level_of
from vila_ops.retrain.feedback import ErrorSlice, ratings_of, slices_of
from vila_ops.retrain.held_out import held_out_records
from vila_ops.retrain.streams import Comparisons, DatasetRows
from vila_ops.retrain.traffic import kept_requests, place_of, traffic
from vila_ops.train.pace import pace_of, positions_of, sealed_timings
from vila_ops.train.stage import trained_model

if TYPE_CHECKING:
    from vila_ops.plan.plan import Plan

TRAFFIC, NEW_DATA = "traffic", "new data"
STREAMS = 4
"""Images and texts of both: the streams that a window may test."""


@dataclass(frozen=True)
class Moment:
    """When a decision is made, and what was decided before."""

    when: datetime
    window: datetime
    """Start of the schedule's window."""
    history: Sequence[decisions.DecisionRecord]
    """Of this recipe."""


@dataclass(frozen=True)
class Gathered:
    """The evidence, and what a retraining would train."""

    evidence: Evidence
    run: Run | None = None
    """The stage alone, with the settings of the champion's model and both old and new data; None without new data."""
    data: Dataset | None = None
    """That data, prepared."""
    champion: ModelVersion | None = None
    start: Checkpoint | None = None
    """The model that training goes on from."""


def gather(run: Run, policy: RetrainPolicy, moment: Moment, context: RunContext = NO_CONTEXT) -> Gathered:
    """Measure everything that `decide` reads. Raises ValueError for a policy that does not fit the recipe."""
    check_policy(run.recipe, policy)
    name = run.recipe.gate.model_name
    record = alias_register.read(name, store=run.resources.storage.store)
    champion = record.model_version(name, CHAMPION)
    if champion is None:
        return Gathered(Evidence(spent=decisions.spent(moment.history, days=policy.budget.days, when=moment.when)))
    since = next(move.when for move in record.history if move.aliases.get(CHAMPION) == champion.version)
    model = trained_model(champion.checkpoint)
    return _Look(
        run=run.with_changes({"recipe.model": model.model_dump()}),
        policy=policy,
        moment=moment,
        context=context,
        champion=champion,
        since=datetime.fromisoformat(since),
    ).gathered()


def check_policy(recipe: Recipe, policy: RetrainPolicy) -> None:
    """Raise ValueError for a policy whose stages the recipe does not have."""
    for name in (policy.stage, policy.start_after):
        if name is not None and name not in recipe.stages:
            known = list(recipe.stages)
            raise ValueError(
                f"the policy names stage {name!r}; recipe {recipe.name!r} has {known}{did_you_mean(name, known)}"
            )


@dataclass(frozen=True)
class _Look:
    """One look at a champion."""

    run: Run
    """With the settings of the champion's model."""
    policy: RetrainPolicy
    moment: Moment
    context: RunContext
    champion: ModelVersion
    since: datetime
    """When it became champion."""
    notes: list[str] = field(default_factory=list)

    def gathered(self) -> Gathered:
        """All of it."""
        policy, resources, recipe = self.policy, self.run.resources, self.run.recipe
        held_out = held_out_records(recipe, resources).source
        here = listed(policy, cache=resources.storage.cache_folder(), now=self.moment.when.timestamp())
        clean, judged = self._judged(here, held_out)
        wanted = dataset = None
        if clean is not None and any(one.status == "new" for one in judged):
            used = {one.name for one in judged if one.status in ("new", "trained on")}
            mixture = plain(recipe, policy, [one for one in here if one.name in used])
            base, everything = recipe.stages[policy.stage].mixture, prepared(self._prepared(mixture), clean)
            mixed = training_mixture(base, policy, mixture, judged, everything)
            wanted, dataset = self._run_of(mixed), self._prepared(mixed)
        evidence = Evidence(
            champion=self.champion.version,
            model=self.champion.checkpoint.digest,
            deliveries=judged,
            drift=self._drift(clean, judged),
            slices=self._slices(),
            estimate=self._estimate(wanted),
            spent=decisions.spent(self.moment.history, days=policy.budget.days, when=self.moment.when),
            notes=tuple(self.notes),
        )
        return Gathered(evidence, wanted, dataset, self.champion, self._start())

    def _judged(self, here: Sequence[Delivery], held_out: Source) -> tuple[Dataset | None, tuple[DeliveryCounts, ...]]:
        """The cleaned deliveries that are used, and what each one holds.

        One that is refused is taken out, and the others are cleaned again, so that they do not repeat what is not used.
        """
        trained = self._trained()
        aside = decisions.set_aside(self.moment.history, self.policy)
        aside -= set(trained.values())  # a person may promote a model that was refused
        judged = {one.name: unread(one, aside) for one in here if one.problem or one.digest in aside}
        while left := [one for one in here if one.name not in judged]:
            clean = self._prepared(candidates(plain(self.run.recipe, self.policy, left), self.policy, held_out))
            summary = json.loads(file(clean, SUMMARY).read_text())
            counted = [counts_of(one, summary, self.policy.quality, trained=trained) for one in left]
            if refused := [one for one in counted if one.status == "refused"]:
                judged |= {one.name: one for one in refused}
                continue
            judged |= {one.name: one for one in counted}
            return clean, tuple(judged[one.name] for one in here)
        return None, tuple(judged[one.name] for one in here)

    def _prepared(self, mixture: Mixture) -> Dataset:
        return prepare(mixture, self.text, self.run.resources, self.context)

    @property
    def text(self) -> TextFormat:
        """How the champion reads records."""
        return self.run.recipe.text(self.policy.stage)

    def _trained(self) -> dict[str, str]:
        """Digests of the deliveries that the champion was trained on, by name."""
        checkpoint = self.champion.checkpoint
        data = of_digest(Dataset, checkpoint.parents[0], store=store_of(checkpoint.uri))
        if data is None:
            self.notes.append(f"the data of the champion ({checkpoint.parents[0][:12]}) is not in its store any more")
            return {}
        recorded: Mapping[str, str] = manifest_of(data)["recipe"]["sources"]
        return {name: digest for name, digest in recorded.items() if name.startswith(PREFIX)}

    def _start(self) -> Checkpoint:
        """The model that training goes on from: the champion, or what it was after a stage. Raises ValueError."""
        model, wanted = self.champion.checkpoint, self.policy.start_after
        while wanted is not None and model.stage != wanted:
            before = of_digest(Checkpoint, model.parents[1], store=store_of(model.uri))
            if before is None:
                raise ValueError(
                    f"the champion, version {self.champion.version}, does not go back to a model after stage "
                    f"{wanted!r} in {store_of(model.uri)}; set start_after to null to go on from the champion itself"
                )
            model = before
        return model

    def _run_of(self, mixture: Mixture) -> Run:
        policy, stage = self.policy, self.run.recipe.stages[self.policy.stage]
        changes: dict[str, Any] = {"mixture": mixture.model_dump()}
        if policy.num_steps is not None:
            changes |= {"num_steps": policy.num_steps, "epochs": None}
        if policy.learning_rate is not None:
            changes |= {"learning_rate": policy.learning_rate, "learning_rates": {}}
        recipe = self.run.recipe.with_changes({"stages": {stage.name: stage.with_changes(changes).model_dump()}})
        own = {name: one for name, one in self.run.resources.train.stages.items() if name == stage.name}
        return Run(recipe=recipe, resources=self.run.resources.with_changes({"train.stages": own}))

    def _estimate(self, wanted: Run | None) -> PlannedCost | None:
        if wanted is None:
            return None
        from vila_ops.plan.plan import plan_run  # heavy: torch

        plan = plan_run(wanted, context=self.context)
        hours = plan.hours if self.run.resources.train.accelerator else self._measured_hours(wanted, plan)
        return PlannedCost(hours=hours, cost=plan.cost)

    def _measured_hours(self, wanted: Run, plan: "Plan") -> float | None:
        """By the pace of the most alike stage in the store; None where no stage of the same parts was trained."""
        ((name, stage),), (planned,) = wanted.recipe.stages.items(), plan.stages
        pace = pace_of(stage, wanted.recipe.model_of(name), sealed_timings(self.run.resources.storage.store))
        return None if pace is None else pace * positions_of(stage.model_dump(), planned.steps) / 3600

    def _slices(self) -> tuple[ErrorSlice, ...]:
        rules = self.policy.feedback
        if rules is None:
            return ()
        place = place_of(self.run.recipe.service, self.run.resources)
        if place is None:
            self.notes.append("feedback is not read: the service keeps no requests; set serve.samples in the resources")
            return ()
        return slices_of(ratings_of(place, self.champion.checkpoint.digest), rules)

    def _drift(self, clean: Dataset | None, judged: Sequence[DeliveryCounts]) -> tuple[Drift, ...]:
        """The comparisons of this window. Each stream has one: that of an earlier look in the window counts again."""
        rules = self.policy.drift
        if rules is None:
            return ()
        tested = self._tested()
        names = {one.stream.partition(",")[0] for one in tested}
        pairs = {} if TRAFFIC in names else self._traffic(rules.max_samples)
        if clean is not None and NEW_DATA not in names:
            of = {one.name: one.status for one in judged}
            rows = [row for row in index_of(clean).to_pylist() if row["split"] == "train"]
            old = [row for row in rows if of.get(row["source"], "trained on") == "trained on"]
            new = [row for row in rows if of.get(row["source"]) == "new"]
            pairs[NEW_DATA] = ((clean, old), (clean, new))
        level = level_of(rules, self.policy.schedule, streams=STREAMS)
        compared = Comparisons(self.champion.checkpoint, self.run.resources, rules, level)
        fresh = (one for name, (before, now) in pairs.items() for one in compared.streams(name, before, now))
        return (*tested, *fresh)

    def _tested(self) -> tuple[Drift, ...]:
        """The comparisons with this champion of earlier looks in this window."""
        tested: dict[str, Drift] = {}
        for one in self.moment.history:
            of_model = one.evidence is not None and one.evidence.model == self.champion.checkpoint.digest
            if one.evidence is not None and of_model and one.window == self.moment.window:
                tested |= {drift.stream: drift for drift in one.evidence.drift}
        if tested:
            self.notes.append(f"{', '.join(tested)} were compared earlier in this window")
        return tuple(tested.values())

    def _traffic(self, most: int) -> dict[str, tuple[DatasetRows, DatasetRows]]:
        """Requests of the last whole window, and those before it since the champion answers; `most` drawn of each."""
        place = place_of(self.run.recipe.service, self.run.resources)
        if place is None:
            return {}
        end = self.moment.window
        start = end - timedelta(hours=self.policy.schedule.window_hours)
        kept, times = kept_requests(place), ((self.since, start), (start, end))
        names = [[name for name, at in kept.items() if a.timestamp() <= at < z.timestamp()] for a, z in times]
        if min(map(len, names)) < FEWEST:
            counts = f"{len(names[1])} requests of the last window and {len(names[0])} before it were kept"
            self.notes.append(f"traffic is not compared: {counts}, and {FEWEST} of each are needed")
            return {}
        drawn = [sorted(random.Random(f"{end}").sample(of, min(most, len(of)))) for of in names]
        try:
            before, now = (traffic(place, of, text=self.text, resources=self.run.resources) for of in drawn)
        except ValueError as error:  # such as no request that can be read; retraining does not hang on it
            self.notes.append(f"traffic is not compared: {error}")
            return {}
        return {TRAFFIC: ((before, index_of(before).to_pylist()), (now, index_of(now).to_pylist()))}
