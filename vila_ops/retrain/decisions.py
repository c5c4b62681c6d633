"""Decisions about retraining as sealed artifacts, with the rule that decided and every number: they are its history."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal, get_args

from pydantic import ValidationError

from vila_ops import __version__
from vila_ops.artifacts import attempts, store
from vila_ops.artifacts.execution import execution
from vila_ops.artifacts.kinds import Decision
from vila_ops.artifacts.listing import manifests
from vila_ops.config import Config
from vila_ops.config.retrain import RetrainPolicy
from vila_ops.data.branches import DataRevision
from vila_ops.data.preprocess.identity import source_recipe
from vila_ops.errors import CorruptArtifact
from vila_ops.retrain.decide import Decided, Evidence, Spent

REVISION = 1
"""Raised if the content of a decision changes."""
PAGE, CONTENT = "decision.md", "decision.json"
Subject = Literal["retrain", "gate", "canary"]
SUBJECTS: tuple[Subject, ...] = get_args(Subject)
TRAINING = ("stage", "start_after", "replay", "num_steps", "learning_rate")
"""Rules of a policy by which a model comes out as it does."""


class DecisionRecord(Config):
    """The content of a decision."""

    name: str
    """Of the recipe."""
    subject: Subject
    when: datetime
    """UTC."""
    window: datetime
    """Start of the schedule's window, in UTC."""
    trigger: str
    """What asked: `schedule`, `event` or a person's command."""
    decided: Decided
    policy: dict[str, Any]
    """The rules, without the places of the sources."""
    evidence: Evidence | None = None
    """Of a decision to retrain."""
    data: str | None = None
    """Digest of the dataset that is trained on."""
    model: str | None = None
    """Digest of the model that was judged."""
    version: int | None = None
    """Its version in the registry."""
    revision: DataRevision | None = None
    """Of the data, where it was decided to retrain."""
    cause: str | None = None
    """Digest of the decision that this one follows from."""


def told_policy(policy: RetrainPolicy) -> dict[str, Any]:
    """The rules of a policy without places of this machine, which nothing sealed names."""
    return {**policy.model_dump(mode="json"), "watch": {name: source_recipe(one) for name, one in policy.watch.items()}}


def seal(record: DecisionRecord, *, root: str, parents: Sequence[str] = ()) -> Decision:
    """Seal a decision in a store; the same one gives the same artifact."""
    content = record.model_dump(mode="json")
    caused = (record.cause,) if record.cause else ()
    at = store.address(Decision, revision=REVISION, recipe=content, parents=(*caused, *parents))
    if done := store.find(Decision, at, store=root):
        return done
    with attempts.attempt(at, store=root) as attempt:
        (attempt / CONTENT).write_text(record.model_dump_json(indent=1), encoding="utf-8")
        (attempt / PAGE).write_text(page(record), encoding="utf-8")
    facts = {
        "name": record.name,
        "subject": record.subject,
        "verdict": record.decided.verdict,
        "rule": record.decided.rule,
    }
    return store.seal(Decision, at, attempt, facts=facts, execution=execution(launch="inline", seconds=0.0, ran=[]))


def history(name: str, *, root: str) -> list[tuple[str, DecisionRecord]]:
    """Digest and content of every decision about a recipe, by time, and in one step by what follows from what.

    Raises CorruptArtifact.
    """
    listed = [
        (str(manifest["digest"]), record_of(manifest))
        for _, manifest in manifests(Decision, store=root)
        if manifest["facts"]["name"] == name
    ]
    return sorted(listed, key=lambda one: (one[1].when, SUBJECTS.index(one[1].subject), one[0]))


def record_of(manifest: Mapping[str, Any]) -> DecisionRecord:
    """The content of a decision with this manifest. Raises CorruptArtifact for one that this version cannot read."""
    try:
        return DecisionRecord.model_validate(manifest["recipe"])
    except ValidationError as error:
        raise CorruptArtifact(
            f"{manifest['address']} is not a decision that vila-ops {__version__} reads; use the version that sealed "
            f"it, or a later one: {error}"
        ) from error


def spent(records: Sequence[DecisionRecord], *, days: float, when: datetime) -> Spent:
    """What the decisions to retrain took in the last days. Pure."""
    made = [one for one in records if one.subject == "retrain" and one.decided.verdict == "retrain"]
    recent = [one.evidence.estimate for one in made if one.evidence and when - one.when < timedelta(days=days)]
    return Spent(
        hours=sum(one.hours or 0.0 for one in recent if one),
        cost=sum(one.cost or 0.0 for one in recent if one),
        last=max((one.when for one in made), default=None),
    )


def set_aside(records: Sequence[DecisionRecord], policy: RetrainPolicy) -> set[str]:
    """Digests of the deliveries that were new in a retraining whose model the gate or the canary refused. Pure.

    A policy that trains otherwise may try them again.
    """
    wanted = policy.model_dump(mode="json")
    same = [one for one in records if all(one.policy[key] == wanted[key] for key in TRAINING)]
    by_data = {one.data: one for one in same if one.subject == "retrain" and one.data}
    refused = [one for one in records if one.subject != "retrain" and one.decided.verdict == "refused"]
    causes = [by_data[one.data] for one in refused if one.data in by_data]
    return {
        delivery.digest
        for cause in causes
        for delivery in (cause.evidence.deliveries if cause.evidence else ())
        if delivery.status == "new"
    }


def page(record: DecisionRecord) -> str:
    """A decision for people, in Markdown. Pure."""
    decided = record.decided
    lines = [
        f"# {record.name}: {record.subject}: {decided.verdict}",
        "",
        f"{record.when.isoformat(timespec='seconds')}, asked by {record.trigger}. Rule: {decided.rule}.",
        "",
        decided.reason,
        *(["", f"What would have to change: {decided.change}."] if decided.change else []),
        *(["", "| rule | holds | numbers |", "| --- | --- | --- |"] if decided.checks else []),
        *(f"| {one.rule} | {'yes' if one.holds else 'no'} | {_cell(one.reason)} |" for one in decided.checks),
    ]
    if record.evidence is not None:
        lines += _evidence(record.evidence)
    if (made := record.revision) is not None:
        where = f"branch {made.branch}, commit {made.commit}" if made.branch else f"the store alone: {made.reason}"
        lines += ["", f"Data {record.data}: {_cell(where)}.", "", "```diff", made.card_diff.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def _evidence(evidence: Evidence) -> list[str]:
    lines: list[str] = []
    if evidence.deliveries:
        head = ["delivery", "status", "records", "bad", "duplicates", "leaking", "left out", "train samples", "reason"]
        rows = [
            [one.name, one.status, one.records, one.bad, one.duplicates, one.leaking, one.other_left_out,
             one.train_samples, one.reason]
            for one in evidence.deliveries
        ]  # fmt: skip
        lines += ["", *_table(head, rows)]
    if evidence.drift:
        head = ["stream", "before", "now", "MMD²", "p", "level", "effect", "PSI", "drifted"]
        numbers = [
            [one.stream, one.before, one.now, f"{one.mmd2:.4g}", f"{one.p_value:.3g}", f"{one.level:.3g}",
             f"{one.effect:.3g}", f"{one.psi:.3g}", "yes" if one.drifted else "no"]
            for one in evidence.drift
        ]  # fmt: skip
        lines += ["", *_table(head, numbers)]
    if evidence.slices:
        slices = [[one.name, one.rated, one.bad, f"{one.p_value:.3g}"] for one in evidence.slices]
        lines += ["", *_table(["answers", "rated", "bad", "p"], slices)]
    return [*lines, *(line for note in evidence.notes for line in ("", f"- {note}"))]


def _table(head: list[str], rows: list[list[Any]]) -> list[str]:
    return [f"| {' | '.join(_cell(str(cell)) for cell in row)} |" for row in (head, ["---"] * len(head), *rows)]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
