"""The task `register`: one version of the MLflow registry for each checkpoint, and the alias of the best one.

Decided once for (gate, checkpoint, report): a later run of an old recipe does not take the alias back. The tag `ready`
is set last, so that a version without it is finished by the next call.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vila_ops.artifacts.kinds import Checkpoint, EvalReport, ModelVersion
from vila_ops.artifacts.store import file, verify
from vila_ops.config import NO_CONTEXT, Gate, Resources, RunContext, fingerprint
from vila_ops.errors import PromotionRaceLost
from vila_ops.registry.gate import GateVerdict, judge, metrics_of
from vila_ops.tracking import translated

CHAMPION = "champion"
SCHEME = "vila-store://"
"""An MLflow server refuses a plain path as a version's source, so a path of the store is given this scheme."""

log = logging.getLogger(__name__)


def register(
    gate: Gate,
    checkpoint: Checkpoint,
    report: EvalReport,
    champion_report: EvalReport | None,
    resources: Resources,
    context: RunContext = NO_CONTEXT,
) -> ModelVersion:
    """The version of a checkpoint, judged by the gate; the alias `champion` points to it if every rule holds.

    champion_report is of the present champion, None where there is none. Raises CorruptArtifact for damaged weights,
    and ValueError for a report of another model or of a champion that is no longer the champion.
    """
    if report.model != checkpoint.digest:
        raise ValueError(f"the report is of model {report.model[:12]}, not of {checkpoint.digest[:12]}; evaluate that")
    verify(checkpoint)
    verify(report)
    decision = fingerprint({"gate": gate.model_dump(mode="json"), "report": report.digest})
    with _client(resources, f"the registration of {gate.model_name!r}") as client:
        version = _version_of(client, gate.model_name, checkpoint)
        if version.tags.get("gate.decision") != decision or version.tags.get("ready") != "true":
            _decide(client, gate, version, report, champion_report, decision=decision)
        return _handle(client, gate.model_name, int(version.version))


def champion(gate: Gate, resources: Resources) -> ModelVersion | None:
    """The version that the alias `champion` points to, with the handle of its checkpoint; None where there is none."""
    with _client(resources, f"a question about {gate.model_name!r}") as client:
        number = _champion_number(client, gate.model_name)
        return None if number is None else _handle(client, gate.model_name, number)


def report_of(version: ModelVersion, resources: Resources) -> EvalReport:
    """The report by which a version was last judged."""
    with _client(resources, f"a question about {version.name!r}") as client:
        found = client.get_model_version(version.name, str(version.version))
    try:
        return EvalReport.model_validate_json(found.tags["report"])
    except KeyError as error:
        raise ValueError(f"{version.name} version {version.version} was not judged yet; register it again") from error


def _decide(
    client: Any, gate: Gate, version: Any, report: EvalReport, champion_report: EvalReport | None, *, decision: str
) -> None:
    name, number = gate.model_name, int(version.version)
    present = _champion_number(client, name)
    rival = None if present in (None, number) else _handle(client, name, present or 0)
    verdict = _verdict(gate, report, champion_report, rival)
    tags = {
        "ready": "false",
        "gate.status": "passed" if verdict.passed else "refused",
        "gate.reason": "; ".join(verdict.reasons),
        "gate.decision": decision,
        "report": report.model_dump_json(),
        "report.digest": report.digest,
    }
    for key, value in tags.items():
        _set_tag(client, name, number, key, value)
    if verdict.passed and present != number:
        _promote(client, name, number, present=present)
    _set_tag(client, name, number, "ready", "true")
    log.info("%s version %d %s: %s", name, number, tags["gate.status"], tags["gate.reason"])


def _verdict(
    gate: Gate, report: EvalReport, champion_report: EvalReport | None, rival: ModelVersion | None
) -> GateVerdict:
    """Against the champion, unless there is none or the model is the champion itself."""
    own = _metrics(report)
    if rival is None or all(rule.max_regression is None for rule in gate.rules):
        return judge(gate, own, None)
    if champion_report is None or champion_report.model != rival.checkpoint.digest:
        given = f"of model {champion_report.model[:12]}" if champion_report else "missing"
        raise ValueError(
            f"the champion of {gate.model_name} is version {rival.version}, model {rival.checkpoint.digest[:12]}, "
            f"but the champion's report is {given}; evaluate the champion on the same suite and register again"
        )
    if champion_report.suite != report.suite:
        raise ValueError(
            f"the reports are of two suites, {report.suite!r} and the champion's {champion_report.suite!r}; "
            f"evaluate the champion on {report.suite!r}"
        )
    verify(champion_report)
    return judge(gate, own, _metrics(champion_report))


def _promote(client: Any, name: str, number: int, *, present: int | None) -> None:
    """Move the alias from the version that was compared with. Raises PromotionRaceLost."""
    now = _champion_number(client, name)
    if now == present:
        if present is not None:
            _set_tag(client, name, number, "champion.previous", str(present))
        now = _set_champion(client, name, number)
    if now != number:
        raise PromotionRaceLost(
            f"the champion of {name} became version {now} while version {number} was judged against version {present}; "
            f"register again to be judged against the new one"
        )


def _version_of(client: Any, name: str, checkpoint: Checkpoint) -> Any:
    """The one version with the checkpoint's digest; the lowest wins where several processes made one, the others go."""
    found = _with_digest(client, name, checkpoint.digest)
    if not found:
        _ensure_model(client, name)
        client.create_model_version(
            name,
            source=checkpoint.uri if "://" in checkpoint.uri else f"{SCHEME}{Path(checkpoint.uri).resolve()}",
            tags={
                "digest": checkpoint.digest,
                "stage": checkpoint.stage,
                "step": str(checkpoint.step),
                "parents": json.dumps(checkpoint.parents),
            },
        )
        found = _with_digest(client, name, checkpoint.digest)
    first, *others = found
    for other in others:
        _delete(client, name, other.version)
    return first


def _with_digest(client: Any, name: str, digest: str) -> list[Any]:
    found = client.search_model_versions(f"tag.digest = '{digest}'")
    return sorted((one for one in found if one.name == name), key=lambda one: int(one.version))


def _ensure_model(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _delete(client: Any, name: str, number: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.delete_model_version(name, str(number))
    except MlflowException as error:  # another process deleted it first
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise


def _set_tag(client: Any, name: str, number: int, key: str, value: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.set_model_version_tag(name, str(number), key, value)
    except MlflowException:  # MLflow lets only one of two processes insert the same new tag
        if client.get_model_version(name, str(number)).tags.get(key) != value:
            raise


def _set_champion(client: Any, name: str, number: int) -> int | None:
    """Point the alias to a version and read back where it points."""
    from mlflow.exceptions import MlflowException

    try:
        client.set_registered_model_alias(name, CHAMPION, str(number))
    except MlflowException:  # as for tags
        if _champion_number(client, name) is None:
            raise
    return _champion_number(client, name)


def _champion_number(client: Any, name: str) -> int | None:
    from mlflow.exceptions import MlflowException

    try:
        number = client.get_registered_model(name).aliases.get(CHAMPION)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return None if number is None else int(number)


def _handle(client: Any, name: str, number: int) -> ModelVersion:
    found = client.get_model_version(name, str(number))
    checkpoint = Checkpoint(
        uri=found.source.removeprefix(SCHEME),
        digest=found.tags["digest"],
        parents=tuple(json.loads(found.tags["parents"])),
        stage=found.tags["stage"],
        step=int(found.tags["step"]),
    )
    promoted = _champion_number(client, name) == number
    return ModelVersion(name=name, version=number, checkpoint=checkpoint, promoted=promoted)


def _metrics(report: EvalReport) -> dict[str, Any]:
    return metrics_of(json.loads(file(report, "report.json").read_text()))


@contextmanager
def _client(resources: Resources, request: str) -> Iterator[Any]:
    """MLflow's client, its errors translated. Raises TrackerRefused, TrackerUnreachable."""
    if resources.tracking.uri is None:
        raise ValueError("the registry is MLflow's: set resources.tracking.uri (a server or sqlite:///FILE)")
    from mlflow import MlflowClient

    with translated(resources.tracking.uri, request):
        yield MlflowClient(resources.tracking.uri, registry_uri=resources.tracking.uri)
