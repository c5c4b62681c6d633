"""The few calls to MLflow that we make. Without a tracking URI nothing is logged and MLflow is not imported.

MLflow has to answer when a run begins. After that no task waits for it, see `outbox`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from vila_ops.artifacts.kinds import Artifact
from vila_ops.config import Resources
from vila_ops.errors import TrackerRefused, TrackerUnreachable
from vila_ops.tracking.outbox import MetricLog as MetricLog
from vila_ops.tracking.outbox import connect, shown

EXPERIMENT = "vila"
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
        flat = [entities.Param(key, str(value)[:500]) for key, value in flatten(params).items()]
        for start in range(0, len(flat), 100):  # the server's limit for one call
            client.log_batch(run_id, params=flat[start : start + 100])
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
def whole_run(
    resources: Resources, name: str, *, key: tuple[str, str], params: dict[str, Any], tags: dict[str, str]
) -> Iterator[str | None]:
    """The MLflow run of a whole recipe while the body runs: the one with the tag `key`, reopened, or a new one."""
    if resources.tracking.uri is None:
        yield None
        return
    with translated(resources.tracking.uri, f"the run {name!r}; nothing was computed for it yet"):
        run_id = _find_run(resources.tracking.uri, key)
    if run_id is None:
        run_id = start_run(resources, name, parent=None, params=params, tags=dict([key]))
    client, _ = connect(resources.tracking.uri)
    with translated(resources.tracking.uri, f"the run {name!r}; nothing was computed for it yet"):
        client.update_run(run_id, status="RUNNING")
        for tag, value in tags.items():
            client.set_tag(run_id, tag, value)
    failed = True
    try:
        yield run_id
        failed = False
    finally:
        end_run(resources, run_id, failed=failed)


def _find_run(tracking_uri: str, key: tuple[str, str]) -> str | None:
    client, _ = connect(tracking_uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return None
    tag, value = key
    runs = client.search_runs([experiment.experiment_id], f"tags.{tag} = '{value}'", max_results=1)
    return runs[0].info.run_id if runs else None


def page(tracking_uri: str | None, run_id: str | None) -> str | None:
    """The URL of a run's page; None without a server."""
    if not (tracking_uri and run_id and tracking_uri.startswith("http")):
        return None
    with translated(tracking_uri, f"a question about run {run_id}"):
        experiment = connect(tracking_uri)[0].get_run(run_id).info.experiment_id
    return f"{tracking_uri}/#/experiments/{experiment}/runs/{run_id}{TRAINING}"


def runs_page(tracking_uri: str | None) -> str | None:
    """The URL of the page of all runs; None without a server, and before the first run."""
    if not (tracking_uri and tracking_uri.startswith("http")):
        return None
    with translated(tracking_uri, f"a question about experiment {EXPERIMENT!r}"):
        experiment = connect(tracking_uri)[0].get_experiment_by_name(EXPERIMENT)
    return experiment and f"{tracking_uri}/#/experiments/{experiment.experiment_id}/runs{TRAINING}"


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


def end_run(resources: Resources, run_id: str | None, *, failed: bool) -> None:
    """Close a run, now or when MLflow answers again, see `outbox`."""
    with MetricLog(resources, run_id) as run:
        run.end(failed=failed)


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
