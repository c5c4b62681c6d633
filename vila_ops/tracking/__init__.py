"""The few calls to MLflow that we make. Without a tracking URI nothing is logged and MLflow is not imported.

MLflow has to answer when a run begins. After that no task waits for it, see `outbox`.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vila_ops.artifacts import leases
from vila_ops.artifacts.kinds import Artifact
from vila_ops.config import Resources
from vila_ops.errors import Preempted, TrackerRefused, TrackerUnreachable
from vila_ops.tracking.outbox import MetricLog as MetricLog
from vila_ops.tracking.outbox import Status as Status
from vila_ops.tracking.outbox import connect, shown

EXPERIMENT = "vila"
LEASE = "lease"
"""Tag with the name of the lease, see `leases.alive`, of the process that runs a run.

A server that hangs makes a run of each request that MLflow's client sends again, and of the last one too where nobody
waits for its answer any more. All of them have this tag.
"""
KIND = {"mlflow.experimentKind": "custom_model_development"}
"""The tag that marks an experiment as one of training runs, not of traces of an application."""
TRAINING = "?workflowType=machine_learning"
"""Of a page's URL: MLflow 3.17 does not look at the tag, and shows traces first unless the browser or URL says this."""
REFUSALS = (
    *("INVALID_PARAMETER_VALUE", "MALFORMED_REQUEST", "NOT_IMPLEMENTED", "FEATURE_DISABLED", "ENDPOINT_NOT_FOUND"),
    *("PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "QUOTA_EXCEEDED", "RESOURCE_LIMIT_EXCEEDED"),
    *("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND", "INVALID_STATE", "INVALID_STATE_TRANSITION"),
)
"""Error codes of MLflow that the next try would meet again."""
WAY_OUT = "See that it runs (`vila-ops up`, or tracking.uri in the resources), or set tracking.uri to null"
DIGEST_SIZE = 36
"""Characters of a dataset's digest that MLflow keeps."""


def start_run(
    resources: Resources, name: str, *, parent: str | None, params: dict[str, Any], tags: dict[str, str]
) -> str | None:
    """A new run under `parent`; returns its id. Raises TrackerUnreachable, TrackerRefused."""
    if resources.tracking.uri is None:
        return None
    client, entities = connect(resources.tracking.uri)
    if parent:
        tags = {**tags, "mlflow.parentRunId": parent}
    with translated(resources.tracking.uri, f"the run {name!r}; nothing was computed for it yet"):
        experiment_id = _experiment(resources.tracking.uri)
        run_id: str = client.create_run(experiment_id, run_name=name, tags=tags).info.run_id
        _log_params(client, run_id, [entities.Param(key, value) for key, value in _texts(params).items()])
    return run_id


def log_input(
    resources: Resources, run_id: str | None, data: Artifact, *, name: str, context: Literal["train", "eval"]
) -> None:
    """Record the data that a run reads, with its digest. Raises TrackerUnreachable, TrackerRefused."""
    if resources.tracking.uri is None or run_id is None:
        return
    client, entities = connect(resources.tracking.uri)
    dataset = entities.Dataset(
        name=name,
        digest=data.digest[:DIGEST_SIZE],
        source_type="s3" if data.uri.startswith("s3://") else "local",
        source=data.uri,
    )
    tags = [entities.InputTag("mlflow.data.context", context), entities.InputTag("digest", data.digest)]
    with translated(resources.tracking.uri, f"the input {name!r}; nothing was computed for it yet"):
        client.log_inputs(run_id, [entities.DatasetInput(dataset, tags)])


@contextmanager
def open_run(
    resources: Resources, name: str, *, key: tuple[str, str], parent: str | None, params: dict[str, Any],
    tags: dict[str, str],
) -> Iterator[str | None]:  # fmt: skip
    """The MLflow run with the tag `key` while the body runs: one that was begun before goes on, else it is a new one.

    Its lease shows that this process lives. Where a process was killed or could not begin its run, the next one without
    a parent ends the runs of its lease as KILLED. Raises TrackerUnreachable, TrackerRefused.
    """
    uri, store = resources.tracking.uri, resources.storage.store
    if uri is None:
        yield None
        return
    with leases.alive(store) as lease:
        if parent is None:
            _end_left(uri, store)
        tags = {**tags, LEASE: lease}
        run_id = _reopened(uri, name, key, params, {**tags, **({"mlflow.parentRunId": parent} if parent else {})})
        is_new = run_id is None
        if is_new:
            run_id = start_run(resources, name, parent=parent, params=params, tags={**tags, key[0]: key[1]})
        status: Status = "KILLED"
        try:
            yield run_id
            status = "FINISHED"
        except Exception as error:
            status = "KILLED" if isinstance(error, Preempted) else "FAILED"
            raise
        finally:
            with MetricLog(resources, run_id) as run:
                if is_new:
                    run.end_twins(LEASE, lease)
                run.end(status)


def _reopened(
    tracking_uri: str, name: str, key: tuple[str, str], params: dict[str, Any], tags: dict[str, str]
) -> str | None:
    """The run with the tag `key`, running again, with these tags and those params that it lacks; None without one.

    Of several it is the newest to which something was logged.
    """
    client, entities = connect(tracking_uri)
    with translated(tracking_uri, f"the run {name!r}; nothing was computed for it yet"):
        runs = _runs_with(tracking_uri, *key)
        if not runs:
            return None
        run = next((one for one in runs if one.data.params), runs[0])
        run_id: str = run.info.run_id
        client.log_batch(run_id, tags=[entities.RunTag(tag, value) for tag, value in tags.items()])
        client.update_run(run_id, status="RUNNING")  # under the new lease: another process ends those of the old one
        there = run.data.params
        _log_params(client, run_id, [entities.Param(k, v) for k, v in _texts(params).items() if k not in there])
    return run_id


def _end_left(tracking_uri: str, store: str) -> None:
    """End the runs that go on in MLflow alone."""
    client, _ = connect(tracking_uri)
    for lease in leases.ended(store):
        with translated(tracking_uri, "the end of runs whose processes have ended; nothing was computed yet"):
            for run in _runs_with(tracking_uri, LEASE, lease):
                if run.info.status == "RUNNING":
                    client.set_terminated(run.info.run_id, "KILLED")
        leases.forget(lease, store=store)


def _runs_with(tracking_uri: str, tag: str, value: str) -> list[Any]:
    """The runs with a tag, the newest first."""
    client, _ = connect(tracking_uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return []
    return list(client.search_runs([experiment.experiment_id], f"tags.{tag} = '{value}'"))


def _texts(params: dict[str, Any]) -> dict[str, str]:
    return {key: str(value)[:500] for key, value in flatten(params).items()}


def _log_params(client: Any, run_id: str, params: list[Any]) -> None:
    for start in range(0, len(params), 100):  # the server's limit for one call
        client.log_batch(run_id, params=params[start : start + 100])


def ask(resources: Resources) -> None:
    """Ask MLflow one small question, if there is one. Raises TrackerUnreachable, TrackerRefused."""
    if (uri := resources.tracking.uri) is not None:
        with translated(uri, f"a question about experiment {EXPERIMENT!r}"):
            connect(uri)[0].get_experiment_by_name(EXPERIMENT)


@dataclass(frozen=True)
class Pages:
    """The URLs of MLflow's pages."""

    all_runs: str | None = None
    """None without a server, and before the first run."""
    runs: Mapping[str, str] = field(default_factory=dict)
    """By the ids of those runs that MLflow has."""


def pages(tracking_uri: str | None, run_ids: Iterable[str | None]) -> Pages:
    """The pages of all runs together and of each of these. Raises TrackerUnreachable, TrackerRefused."""
    if not (tracking_uri and tracking_uri.startswith("http")):
        return Pages()
    client, _ = connect(tracking_uri)
    with translated(tracking_uri, f"a question about experiment {EXPERIMENT!r}"):
        if (experiment := client.get_experiment_by_name(EXPERIMENT)) is None:
            return Pages()
        listed = ", ".join(f"'{run_id}'" for run_id in run_ids if run_id)
        found = client.search_runs([experiment.experiment_id], f"attributes.run_id IN ({listed})") if listed else ()
    all_runs = f"{tracking_uri}/#/experiments/{experiment.experiment_id}/runs"
    of_run = {run.info.run_id: f"{all_runs}/{run.info.run_id}{TRAINING}" for run in found}
    return Pages(f"{all_runs}{TRAINING}", of_run)


def evaluations(resources: Resources, run_id: str) -> dict[str, str]:
    """The names of the evaluations below a run by their ids, the newest first.

    Raises TrackerRefused for an unknown run, and ValueError without a tracking URI.
    """
    uri = resources.tracking.uri
    if uri is None:
        raise ValueError(f"run {run_id} is MLflow's: set resources.tracking.uri (a server or sqlite:///FILE)")
    client, _ = connect(uri)
    with translated(uri, f"a question about run {run_id}"):
        experiment = client.get_run(run_id).info.experiment_id
        below = client.search_runs(
            [experiment], f"tags.`mlflow.parentRunId` = '{run_id}' and tags.task = 'evaluate'", max_results=100
        )
    return {run.info.run_id: run.info.run_name for run in below}


def end_run(resources: Resources, run_id: str | None, status: Status) -> None:
    """Close a run, now or when MLflow answers again, see `outbox`."""
    with MetricLog(resources, run_id) as run:
        run.end(status)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings to dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


@contextmanager
def translated(tracking_uri: str, request: str) -> Iterator[None]:
    """Translate MLflow's errors about a request. Raises TrackerRefused, TrackerUnreachable."""
    from mlflow.exceptions import MlflowException  # heavy

    try:
        yield
    except MlflowException as error:
        kind = TrackerRefused if error.error_code in REFUSALS else TrackerUnreachable
        raise kind(f"MLflow at {shown(tracking_uri)} does not take {request}: {shown(error)}. {WAY_OUT}") from error


def _experiment(tracking_uri: str) -> str:
    client, _ = connect(tracking_uri)
    if (experiment := client.get_experiment_by_name(EXPERIMENT)) is not None:
        return str(experiment.experiment_id)
    return str(client.create_experiment(EXPERIMENT, artifact_location=_files_beside(tracking_uri), tags=KIND))


def _files_beside(tracking_uri: str) -> str | None:
    """Folder for MLflow artifacts beside an sqlite file; None for a server, which has its own."""
    kind, _, path = tracking_uri.partition(":///")
    return str(Path(path).resolve().parent / "mlflow-artifacts") if kind == "sqlite" else None
