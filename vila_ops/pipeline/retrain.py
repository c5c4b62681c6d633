"""Retraining step by step: a look decides, a stage trains, the gate judges, a canary runs. Each step is one decision.

Everything that a step needs is in the store, the registers and earlier decisions. So a step that was killed is made
again, and one that waits, such as for a canary, costs nothing meanwhile.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from vila_ops.artifacts.kinds import Dataset, Deployment, ModelVersion
from vila_ops.artifacts.leases import hold
from vila_ops.artifacts.listing import of_digest
from vila_ops.artifacts.progress import Reporter
from vila_ops.artifacts.store import Address
from vila_ops.config import NO_CONTEXT, Run, RunContext
from vila_ops.config.retrain import RetrainPolicy
from vila_ops.data.branches import DataRevision, on_a_branch
from vila_ops.eval.needs import check_held_out
from vila_ops.pipeline.events import begin_event
from vila_ops.pipeline.promotion import register_model
from vila_ops.pipeline.stages import TASKS, Tasks, suite_text
from vila_ops.pipeline.windows import FlowRun, begin, window_of
from vila_ops.registry import alias_register
from vila_ops.registry.aliases import CHALLENGER, CHAMPION, AliasRecord
from vila_ops.registry.register import judgement
from vila_ops.release.canary import as_champion, promote, start_canary
from vila_ops.retrain import decisions
from vila_ops.retrain.decide import Decided, RuleCheck, Verdict, decide
from vila_ops.retrain.decisions import DecisionRecord, Subject, told_policy
from vila_ops.retrain.evidence import Gathered, Moment, gather
from vila_ops.serve.tracks import backend_of

CORRECTED = (
    "a model that the rules let through: correct the deliveries, which are set aside until then, add more, or change "
    "how the policy trains (replay, num_steps, learning_rate)"
)
"""What would have to change after a refusal."""


def utc_now() -> datetime:
    """The time in UTC."""
    return datetime.now(UTC)


@dataclass(frozen=True)
class Retraining:
    """A recipe that is retrained by a policy."""

    run: Run
    policy: RetrainPolicy
    trigger: str
    """What asks: `schedule`, `event` or `command`."""
    clock: Callable[[], datetime] = utc_now
    """The time in UTC. A step trains, so hours pass between its decisions."""
    tasks: Tasks = TASKS
    context: RunContext = NO_CONTEXT
    repository: Path = Path()
    """A folder of the git repository in which data revisions are committed to branches."""

    @property
    def root(self) -> str:
        """The store."""
        return self.run.resources.storage.store

    def history(self) -> list[tuple[str, DecisionRecord]]:
        """Every decision so far."""
        return decisions.history(self.run.recipe.name, root=self.root)

    def record(self, subject: Subject, decided: Decided, when: datetime, **more: object) -> DecisionRecord:
        """A decision of a moment."""
        facts = {"name": self.run.recipe.name, "subject": subject, "when": when, "trigger": self.trigger}
        window = window_of(when, self.policy.schedule)
        return DecisionRecord.model_validate(
            {**facts, "window": window, "policy": told_policy(self.policy), "decided": decided, **more}
        )


def begin_step(run: Run, policy: RetrainPolicy, flow_run: FlowRun, *, trigger: str, now: datetime) -> str | None:
    """Whether a run of the flow may make a step: None, or why it has to end. Raises what its `ready` raises.

    A scheduled one needs its window unless a canary waits, and one that asks for events something new.
    """
    if trigger == "event":
        return begin_event(run, policy, flow_run, now=now)
    if trigger != "schedule" or not may_train(run):
        flow_run.ready()
        return None
    window, store = f"{run.recipe.name}.retrain", run.resources.storage.store
    return begin(window, policy.schedule, flow_run, store=store, now=lambda: now)


def may_train(run: Run) -> bool:
    """Whether the next step may train a model: none goes on while a canary waits."""
    record = alias_register.read(run.recipe.gate.model_name, store=run.resources.storage.store)
    return record.version(CHALLENGER) is None


def look(
    run: Run,
    policy: RetrainPolicy,
    *,
    trigger: str,
    when: datetime | None = None,
    dry_run: bool = False,
    context: RunContext = NO_CONTEXT,
) -> DecisionRecord:
    """Decide whether to retrain, and seal the decision unless it is a dry run; nothing is trained.

    Cleaned data is prepared in the store in any case. `when` is the time in UTC, None for now.
    """
    moment = when or utc_now()
    one = Retraining(run, policy, trigger, lambda: moment, context=context)
    record, _ = _looked(one)
    if not dry_run:
        _seal(one, record)
    return record


def step(one: Retraining) -> DecisionRecord:
    """Make the next step, and return the last decision: about a canary that runs, else about retraining.

    Raises ValueError where the resources name no registry.
    """
    if one.run.resources.tracking.uri is None:
        raise ValueError("a retrained model is registered, and tracking.uri is not set; set it in the resources")
    with hold(Address("retrain", one.run.recipe.name, None, ()), store=one.root) as lease:
        lease.report = Reporter("retrain", one.run.recipe.name)
        return _next(one)


def _next(one: Retraining) -> DecisionRecord:
    """The next step; no other process makes one."""
    challenger = _aliases(one).model_version(one.run.recipe.gate.model_name, CHALLENGER)
    if challenger is not None:
        return _canary(one, challenger)
    pending = _unfinished(one)
    record, gathered = _looked(one)
    if pending is not None and gathered.data is not None and gathered.data.digest == pending[1].data:
        return _train_and_judge(one, gathered, cause=pending[0])
    if record.decided.verdict == "retrain":
        record = record.with_changes({"revision": _revision(one, gathered)})
    digest = _seal(one, record)
    return record if record.decided.verdict == "not now" else _train_and_judge(one, gathered, cause=digest)


def _unfinished(one: Retraining) -> tuple[str, DecisionRecord] | None:
    """The last decision to retrain, with its digest, if no gate has judged its model: a process was killed."""
    history = one.history()
    judged = {record.cause for _, record in history if record.subject == "gate"}
    asked = [pair for pair in history if (pair[1].subject, pair[1].decided.verdict) == ("retrain", "retrain")]
    return asked[-1] if asked and asked[-1][0] not in judged else None


def _looked(one: Retraining) -> tuple[DecisionRecord, Gathered]:
    earlier, when = [record for _, record in one.history()], one.clock()
    moment = Moment(when=when, window=window_of(when, one.policy.schedule), history=earlier)
    gathered = gather(one.run, one.policy, moment, one.context)
    decided = decide(one.policy, gathered.evidence, when=when)
    data = gathered.data.digest if gathered.data and decided.verdict == "retrain" else None
    return one.record("retrain", decided, when, evidence=gathered.evidence, data=data), gathered


def _seal(one: Retraining, record: DecisionRecord) -> str:
    """The digest of a sealed decision."""
    model = record.model or (record.evidence.model if record.evidence else None)
    parents = [digest for digest in (model, record.data) if digest is not None]
    return decisions.seal(record, root=one.root, parents=parents).digest


def _revision(one: Retraining, gathered: Gathered) -> DataRevision:
    """The data on a branch of its own, with what changed since the data of the champion."""
    assert gathered.run is not None
    assert gathered.data is not None
    assert gathered.champion is not None
    before = of_digest(Dataset, gathered.champion.checkpoint.parents[0], store=one.root)
    name = gathered.run.recipe.stages[one.policy.stage].mixture.name
    branch = f"vila-retrain/{one.run.recipe.name}-{gathered.data.digest[:12]}"
    return on_a_branch(gathered.data, before, folder=one.repository, name=name, branch=branch)


def _train_and_judge(one: Retraining, gathered: Gathered, *, cause: str) -> DecisionRecord:
    """Train on, let the gate judge the model against the champion, and start the canary of one that passes."""
    assert gathered.run is not None
    assert gathered.data is not None
    assert gathered.start is not None
    winner = "champion" if one.policy.canary is None else "challenger"
    run = gathered.run.with_changes({"recipe.gate.winner": winner})
    recipe, resources, stage = run.recipe, run.resources, run.recipe.stages[one.policy.stage]
    held_out = one.tasks.prepare(recipe.final_suite.mixture, suite_text(recipe, stage.name), resources, one.context)
    check_held_out(recipe.final_suite, held_out)
    model = one.tasks.train_stage(
        stage, recipe.model_of(stage.name), gathered.data, gathered.start, resources, one.context
    )
    report = one.tasks.evaluate(recipe.final_suite, model, held_out, resources, one.context)
    version = register_model(run, model, report, tasks=one.tasks, context=one.context)
    passed, reason = judgement(version, resources)
    decided = _decided("passed" if passed else "refused", "gate", reason, change="" if passed else CORRECTED)
    record = one.record("gate", decided, one.clock(), data=gathered.data.digest, cause=cause, **_of(version))
    _seal(one, record)
    return _canary(one, version) if passed and one.policy.canary is not None else record


def _canary(one: Retraining, challenger: ModelVersion) -> DecisionRecord:
    """Start, await, promote or give up the canary of a challenger."""
    service, resources = one.run.recipe.service, one.run.resources
    state = backend_of(service.name, resources).register.load()
    last = state.rolled_back
    digest = challenger.checkpoint.digest
    mine = [record for _, record in one.history() if record.model == digest and record.subject == "canary"]
    begun = next((record.when for record in mine if record.decided.verdict == "started"), None)
    if state.stable is not None and state.stable.spec.version.checkpoint.digest == digest:
        return _promoted(one, challenger, Deployment(url=state.stable.url, model=digest, version=challenger.version))
    if state.canary is not None and state.canary.track.spec.version.checkpoint.digest == digest:
        return _awaited(one, challenger, begun or one.clock())
    if begun is not None and last is not None and last.digest == digest:
        _without_challenger(one, reason=f"canary: {last.reason}")
        return _settled(one, challenger, _decided("refused", "canary", last.reason, change=CORRECTED))
    if state.stable is None:
        reason = f"version {challenger.version} passed the gate, but {service.name} serves no version beside it"
        return _settled(one, challenger, _decided("not now", "canary", reason, change="deploy the champion"))
    start_canary(service, challenger, resources)
    share = f"{resources.serve.canary.share:g} of the conversations"
    reason = f"version {challenger.version} passed the gate and answers {share}"
    return _settled(one, challenger, _decided("started", "canary", reason))


def _awaited(one: Retraining, challenger: ModelVersion, begun: datetime) -> DecisionRecord:
    """Promote a canary that has run for long enough."""
    hours = one.policy.canary.hours if one.policy.canary else 0.0
    if one.clock() < (end := begun + timedelta(hours=hours)):
        reason = f"version {challenger.version} has answered as a canary since {begun.isoformat(timespec='seconds')}"
        waits = _decided("not now", "canary", reason, change=f"wait until {end.isoformat(timespec='seconds')}")
        return _settled(one, challenger, waits)
    return _promoted(one, challenger, promote(one.run.recipe.service, one.run.resources))


def _promoted(one: Retraining, challenger: ModelVersion, served: Deployment) -> DecisionRecord:
    """The challenger, which answers everything by now, becomes the champion."""
    as_champion(one.run.recipe.gate, served, one.run.resources)
    reason = f"version {challenger.version} was not shown to be worse than the champion while it was a canary"
    return _settled(one, challenger, _decided("promoted", "canary", reason))


def _settled(one: Retraining, challenger: ModelVersion, decided: Decided) -> DecisionRecord:
    """A sealed decision about a canary, which follows from that of the gate."""
    gates = [
        (digest, record)
        for digest, record in one.history()
        if record.subject == "gate" and record.model == challenger.checkpoint.digest
    ]
    cause, data = (gates[-1][0], gates[-1][1].data) if gates else (None, None)
    record = one.record("canary", decided, one.clock(), cause=cause, data=data, **_of(challenger))
    _seal(one, record)
    return record


def _without_challenger(one: Retraining, *, reason: str) -> None:
    name, over = one.run.recipe.gate.model_name, _aliases(one).version(CHAMPION)
    alias_register.move(name, {CHALLENGER: None}, over=over, reason=reason, store=one.root)


def _aliases(one: Retraining) -> AliasRecord:
    return alias_register.read(one.run.recipe.gate.model_name, store=one.root)


def _of(version: ModelVersion) -> dict[str, object]:
    return {"model": version.checkpoint.digest, "version": version.version}


def _decided(verdict: Verdict, rule: str, reason: str, *, change: str = "") -> Decided:
    check = RuleCheck(rule=rule, holds=verdict not in ("refused", "not now"), reason=reason, change=change)
    return Decided(verdict=verdict, rule=rule, reason=reason, change=change, checks=(check,))
