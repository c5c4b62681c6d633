"""Runs of MLflow: begun, gone on with and ended, whoever is killed meanwhile."""

import signal
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from tests.forks import Fork
from tests.tracking.live import begin, history, kept, tracked
from vila_ops import tracking
from vila_ops.artifacts.kinds import Dataset
from vila_ops.config import Resources
from vila_ops.tracking import MetricLog, outbox

LEFT = """
import os, signal, sys, time
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from vila_ops.config import Resources
from vila_ops.tracking import MetricLog, open_run, outbox
outbox.SEND_SECONDS = 0.05
resources = Resources.model_validate_json(sys.argv[1])
client = MlflowClient(resources.tracking.uri)
begin = dict(parent=None, params={"rate": 1}, tags={})
with open_run(resources, "align", key=("address", "a"), **begin) as first:
    with open_run(resources, "sft", key=("address", "b"), **begin), MetricLog(resources, first) as metrics:
        for step in range(7):
            metrics.log_once({"loss": step / 8, "seconds": 1.0}, step=step)
        while len(client.get_metric_history(first, "seconds")) < 7:
            time.sleep(0.02)
        outbox.SEND_SECONDS = 600
        time.sleep(0.1)
        for step in range(7, 10):
            metrics.log_once({"loss": step / 8, "seconds": 1.0}, step=step)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def runs_of(resources: Resources, address: str) -> list[Any]:
    client = MlflowClient(resources.tracking.uri)
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT)
    return list(client.search_runs([experiment.experiment_id], f"tags.address = '{address}'"))


@pytest.mark.slow
def test_the_next_attempt_goes_on_in_the_run_of_a_killed_one_and_other_dead_runs_end(resources: Resources) -> None:
    """The killed attempt told steps 0 to 6, kept 7 to 9 in its file, and the next resumes after step 5."""
    with Fork("-c", LEFT, resources.model_dump_json()) as process:
        assert process.wait() == -signal.SIGKILL
    begin_again: dict[str, Any] = {"parent": None, "params": {"rate": 1, "added": 2}, "tags": {"task": "train_stage"}}
    with (
        tracking.open_run(resources, "alive", key=("address", "c"), **begin_again),
        tracking.open_run(resources, "align", key=("address", "a"), **begin_again) as run_id,
        MetricLog(resources, run_id) as metrics,
    ):
        for step in range(5, 15):
            metrics.log_once({"loss": step / 8, "seconds": 2.0}, step=step)
        (alive,) = runs_of(resources, "c")
        assert alive.info.status == "RUNNING"
    (run,) = runs_of(resources, "a")
    assert (run.info.run_id, run.info.status) == (run_id, "FINISHED")
    assert run.data.params == {"rate": "1", "added": "2"}
    assert [(one.step, one.value) for one in history(resources, run.info.run_id)] == [(n, n / 8) for n in range(15)]
    seconds = {one.step: one.value for one in history(resources, run.info.run_id, "seconds")}
    assert seconds == {step: 1.0 if step < 10 else 2.0 for step in range(15)}
    assert len(history(resources, run.info.run_id, "seconds")) == 15
    (dead,) = runs_of(resources, "b")
    assert dead.info.status == "KILLED"
    assert kept(resources) == []
    assert list(Path(resources.storage.store, "leases/alive").iterdir()) == []


@pytest.mark.parametrize(("error", "status"), [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_run_ends_as_its_body_does(error: type[BaseException], status: str, resources: Resources) -> None:
    with (
        pytest.raises(error),
        tracking.open_run(resources, "align", key=("address", "a"), parent=None, params={}, tags={}),
    ):
        raise error
    (run,) = runs_of(resources, "a")
    assert run.info.status == status


BEGIN: dict[str, Any] = {"parent": None, "params": {"rate": 1}, "tags": {}}


def make_again(monkeypatch: pytest.MonkeyPatch, *, answered: int | None) -> None:
    """Have MLflow make three runs of one request, and tell the client of none or of one of them."""
    honest = MlflowClient.create_run

    def create_run(*given: Any, **more: Any) -> Any:
        made = [honest(*given, start_time=1, **more) for _ in range(3)]
        if answered is None:
            raise MlflowException("timed out")
        return sorted(made, key=lambda run: run.info.run_id)[answered]

    monkeypatch.setattr(MlflowClient, "create_run", create_run)


@pytest.mark.parametrize("answered", range(3))
def test_runs_that_mlflow_made_again_end_and_their_twin_is_gone_on_with(
    answered: int, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        make_again(patch, answered=answered)
        with tracking.open_run(resources, "align", key=("address", "a"), **BEGIN) as run_id:
            assert [run.info.status for run in runs_of(resources, "a")] == ["RUNNING"] * 3
    for _ in range(2):
        statuses = {run.info.run_id: run.info.status for run in runs_of(resources, "a")}
        assert statuses.pop(run_id or "") == "FINISHED"
        assert list(statuses.values()) == ["KILLED"] * 2
        with tracking.open_run(resources, "align", key=("address", "a"), **BEGIN) as again:
            assert again == run_id


def test_of_runs_that_mlflow_made_without_an_answer_one_is_gone_on_with_and_the_others_end(
    resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tracking.open_run(resources, "vila", key=("recipe", "r"), **BEGIN) as parent:
        with monkeypatch.context() as patch:
            make_again(patch, answered=None)
            with (
                pytest.raises(ConnectionError),
                tracking.open_run(resources, "align", key=("address", "a"), **{**BEGIN, "parent": parent}),
            ):
                raise AssertionError
        with tracking.open_run(resources, "align", key=("address", "a"), **{**BEGIN, "parent": parent}):
            assert [run.info.status for run in runs_of(resources, "a")] == ["RUNNING"] * 3
    with tracking.open_run(resources, "vila", key=("recipe", "r"), **BEGIN) as again:
        assert again == parent
    assert sorted(run.info.status for run in runs_of(resources, "a")) == ["FINISHED", "KILLED", "KILLED"]
    assert list(Path(resources.storage.store, "leases/alive").iterdir()) == []


def test_a_server_that_is_away_at_the_start_is_an_error_that_says_what_to_do(away: Resources) -> None:
    with pytest.raises(ConnectionError, match=r"nothing was computed for it yet.*tracking\.uri") as raised:
        begin(away)
    assert "secret" not in str(raised.value)
    with (
        pytest.raises(ConnectionError),
        tracking.open_run(away, "vila", key=("a", "b"), parent=None, params={}, tags={}),
    ):
        raise AssertionError


def test_a_run_names_the_data_that_it_read(resources: Resources) -> None:
    run_id = begin(resources)
    data = Dataset(
        uri=f"{resources.storage.store}/dataset/x", digest="0123456789abcdef" * 4, num_samples=1, num_tokens=1
    )
    tracking.log_input(resources, run_id, data, name="pairs", context="train")
    run = MlflowClient(resources.tracking.uri).get_run(run_id)
    (found,) = run.inputs.dataset_inputs
    assert (found.dataset.name, found.dataset.source) == ("pairs", data.uri)
    assert found.dataset.digest == data.digest[:36]
    assert {tag.key: tag.value for tag in found.tags} == {"mlflow.data.context": "train", "digest": data.digest}
    assert run.data.params == {"a.b": "1"}


def test_the_experiment_is_marked_as_one_of_training_runs(resources: Resources) -> None:
    begin(resources)
    experiment = MlflowClient(resources.tracking.uri).get_experiment_by_name(tracking.EXPERIMENT)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_the_runs_that_mlflow_has_get_a_page(resources: Resources, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that another MLflow has, which an earlier run of the same store logged to, gets none."""
    run_id, database = begin(resources), outbox.connect(resources.tracking.uri or "")
    experiment = database[0].get_run(run_id).info.experiment_id
    monkeypatch.setattr(tracking, "connect", lambda _: database)
    pages = tracking.pages("http://h:1", [None, run_id, "f" * 32])
    url, shown = f"http://h:1/#/experiments/{experiment}/runs", "?workflowType=machine_learning"
    assert (pages.all_runs, pages.runs) == (f"{url}{shown}", {run_id: f"{url}/{run_id}{shown}"})
    assert tracking.pages("http://h:1", [None]) == tracking.Pages(f"{url}{shown}")
    assert tracking.pages(resources.tracking.uri, [run_id]) == tracking.Pages()


def test_without_a_tracking_uri_nothing_is_written(tmp_path: Path) -> None:
    resources = tracked(tmp_path, None)
    assert tracking.start_run(resources, "align", parent=None, params={}, tags={}) is None
    with MetricLog(resources, None) as metrics:
        metrics.log({"loss": 1.0}, step=1)
    tracking.end_run(resources, None, "FINISHED")
    assert list(tmp_path.iterdir()) == []
