"""The task `register`: one version of the MLflow registry for each checkpoint, and the alias of the best one.

The aliases' truth is a register in the store (`alias_register.py`).

A version is judged once for (gate, checkpoint, report), so that a later run of an old recipe does not take the alias
back. The tag `ready` is set last; a version without it is finished by the next call.
"""

import logging

from vila_ops.artifacts.kinds import Checkpoint, EvalReport, ModelVersion
from vila_ops.artifacts.store import verify
from vila_ops.config import NO_CONTEXT, Gate, Resources, RunContext, fingerprint
from vila_ops.errors import PromotionRaceLost
from vila_ops.eval.compare import Comparison
from vila_ops.eval.report import read_report
from vila_ops.registry import alias_register
from vila_ops.registry.aliases import ALIASES, CHAMPION, Alias, AliasRecord, champion_after, rival_of
from vila_ops.registry.gate import judge, metrics_of
from vila_ops.registry.mlflow_registry import DESCRIPTION, MlflowRegistry, open_registry
from vila_ops.registry.training import training_data

log = logging.getLogger(__name__)


def register(
    gate: Gate,
    checkpoint: Checkpoint,
    report: EvalReport,
    champion_report: EvalReport | None,
    resources: Resources,
    context: RunContext = NO_CONTEXT,
) -> ModelVersion:
    """The version of a checkpoint, judged by the gate; the gate's `winner` points to it if every rule holds.

    `champion_report` is the report of the present champion, None without a champion. Raises CorruptArtifact for damaged
    weights, ValueError for a report of another model and for one that cannot be compared with the champion's by a
    rule's metric, and PromotionRaceLost where `champion_report` is not of the present champion or the champion changed
    while this version was judged.
    """
    if report.model != checkpoint.digest:
        raise ValueError(f"the report is of model {report.model[:12]}, not of {checkpoint.digest[:12]}; evaluate that")
    verify(checkpoint)
    verify(report)
    decision = fingerprint({"gate": gate.model_dump(mode="json"), "report": report.digest})
    with open_registry(resources, gate.model_name, f"the registration of {gate.model_name!r}") as registry:
        version = registry.version_of(checkpoint)
        tags = registry.tags(version)
        if tags.get("gate.decision") != decision or tags.get("ready") != "true":
            _decide(registry, gate, version, report, champion_report, decision=decision)
        promoted = registry.followed().version(CHAMPION) == version
        return registry.model_version(version, promoted=promoted)


def champion(gate: Gate, resources: Resources) -> ModelVersion | None:
    """The version that the alias `champion` points to, None without a champion."""
    with open_registry(resources, gate.model_name, f"a question about {gate.model_name!r}") as registry:
        return registry.followed().model_version(gate.model_name, CHAMPION)


def version_of(name: str, version: int, resources: Resources) -> ModelVersion:
    """A registered version, whether or not an alias points to it. Raises TrackerRefused where there is none."""
    with open_registry(resources, name, f"a question about version {version} of {name!r}") as registry:
        return registry.model_version(version)


def report_of(name: str, version: str, resources: Resources) -> EvalReport:
    """The report by which a version was last judged. `version` is its number, or an alias such as `champion`.

    Raises ValueError for an alias that points nowhere and for a version that was not judged yet.
    """
    with open_registry(resources, name, f"a question about {name!r}") as registry:
        number = _number(registry, version)
        tags = registry.tags(number)
    if "report" not in tags:
        raise ValueError(f"{name} version {number} was not judged yet; register it again")
    return EvalReport.model_validate_json(tags["report"])


def judgement(version: ModelVersion, resources: Resources) -> tuple[bool, str]:
    """Whether a version passed the gate when it was last judged, and by which bounds."""
    with open_registry(resources, version.name, f"a question about version {version.version}") as registry:
        tags = registry.tags(version.version)
    return tags.get("gate.status") == "passed", tags.get("gate.reason", "it was not judged yet")


def set_champion(name: str, version: int, resources: Resources, *, reason: str) -> AliasRecord:
    """Make a registered version the champion, whatever the gate said. Raises CorruptArtifact for damaged weights."""
    with open_registry(resources, name, f"version {version} of {name!r}") as registry:
        present, chosen = registry.followed().version(CHAMPION), registry.model_version(version)
        verify(chosen.checkpoint)
        alias_register.move(name, {CHAMPION: chosen}, over=present, reason=reason, store=registry.store)
        return registry.followed()


def shown_in_mlflow(name: str, resources: Resources) -> AliasRecord:
    """The aliases of a model, which MLflow shows now, too. Raises TrackerRefused and TrackerUnreachable."""
    request = f"the aliases of {name!r}, which the store has; MLflow shows them after the next command that asks it"
    with open_registry(resources, name, request) as registry:
        return registry.followed()


def version_named(name: str, version: str, resources: Resources) -> ModelVersion:
    """A registered version. `version` is its number, or an alias such as `champion`.

    Raises ValueError for an alias that points nowhere.
    """
    with open_registry(resources, name, f"a question about {name!r}") as registry:
        return registry.model_version(_number(registry, version))


def _number(registry: MlflowRegistry, version: str) -> int:
    if version in ALIASES:
        registry.followed()
    number = int(version) if version.isdecimal() else registry.aliases().get(version)
    if number is None:
        raise ValueError(f"{registry.name!r} has no version with the alias {version!r}; see them in MLflow")
    return number


def _decide(
    registry: MlflowRegistry,
    gate: Gate,
    version: int,
    report: EvalReport,
    champion_report: EvalReport | None,
    *,
    decision: str,
) -> None:
    """Judge a version, record the verdict as tags and in its card, and move the alias if the version passed."""
    from vila_ops.registry.card import text_of, write_card  # heavy: pyarrow

    record = registry.followed()
    present = record.version(CHAMPION)
    rival = None if rival_of(version, present) is None else record.model_version(registry.name, CHAMPION)
    comparison = _comparison(gate, report, champion_report, rival)
    candidate = registry.model_version(version)
    training = training_data(candidate.checkpoint) if gate.clean_of else ()
    verdict = judge(gate, metrics_of(read_report(report)), comparison, training)
    status, reason = "passed" if verdict.passed else "refused", verdict.reason
    registry.describe(version, text_of(write_card(candidate, report, verdict), most=DESCRIPTION))
    registry.set_tags(
        version,
        {
            "ready": "false",
            "gate.status": status,
            "gate.reason": reason,
            "gate.decision": decision,
            "report": report.model_dump_json(),
            "report.digest": report.digest,
        },
    )
    if champion_after(version, present, passed=verdict.passed) != present:
        passed: dict[Alias, ModelVersion | None] = {gate.winner: candidate}
        alias_register.move(registry.name, passed, over=present, reason=f"gate: {reason}", store=registry.store)
    registry.set_tags(version, {"ready": "true"})
    log.info("%s version %d %s: %s", registry.name, version, status, reason)


def _comparison(
    gate: Gate, report: EvalReport, champion_report: EvalReport | None, rival: ModelVersion | None
) -> Comparison | None:
    """The model compared with its rival by the metrics that the gate compares; None without a rival or such metrics."""
    metrics = [rule.metric for rule in gate.rules if rule.is_compared()]
    if rival is None or not metrics:
        return None
    if champion_report is None or champion_report.model != rival.checkpoint.digest:
        given = f"of model {champion_report.model[:12]}" if champion_report else "missing"
        raise PromotionRaceLost(
            f"the champion of {gate.model_name} is version {rival.version}, model {rival.checkpoint.digest[:12]}, "
            f"but the champion's report is {given}; evaluate the champion on the same suite and register again"
        )
    from vila_ops.eval.compare_reports import compare_reports  # heavy: Pillow

    verify(champion_report)
    reports = {f"version {rival.version}, the champion": champion_report, "the model": report}
    return compare_reports(reports, metrics=metrics).comparison
