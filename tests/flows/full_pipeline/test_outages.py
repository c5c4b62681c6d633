"""Flow runs that are cancelled, killed, never started or waiting for a person, while servers go and come back."""

import contextlib
import json
import os
import time
from pathlib import Path

import httpx
import pytest

from tests.flows.flow_runs import (
    Json,
    PacedFlowRun,
    artifacts_of,
    ask,
    automations,
    cancel,
    kill_server,
    processes_of,
    start_flow_run,
    state_of,
    until,
    up_again,
    waiting_flow_run,
)  # fmt: skip
from tests.told_once import check_told_once
from vila_ops import local
from vila_ops.artifacts.kinds import Checkpoint
from vila_ops.artifacts.store import find, verify
from vila_ops.pipeline.sweeper import START_SECONDS, Sweeper, client_of
from vila_ops.registry import alias_register
from vila_ops.train.checkpoint.unfinished import resume_folders
from vila_ops.train.curve import curve_of
from vila_ops.train.stage import address_of, train_stage

pytestmark = [pytest.mark.ray, pytest.mark.slow]
OUTAGE_SECONDS = float(os.environ.get("VILA_OUTAGE", "10"))


@pytest.fixture(scope="module")
def suspended(first: Json, servers: Json) -> str:
    """A promotion that waits for a person, while all that follows happens to the servers. Nothing is served by it."""
    parameters = {name: f"{servers['folder']}/{name}.yaml" for name in ("recipe", "resources")}
    overrides = ("gate.model_name=approved", "resources.serve.started_by=operator")
    more = {"approval": True, "overrides": overrides}
    flow_run = start_flow_run(servers, "vila-release/promote", {**parameters, **more})
    until(lambda: state_of(servers, flow_run) == "PAUSED")
    until(lambda: not processes_of(flow_run))
    return flow_run


def test_the_job_of_a_cancelled_flow_run_is_stopped(first: Json, servers: Json) -> None:
    jobs = f"{servers['at'].ray_dashboard}/api/jobs/"
    token = Path(local.env(servers["settings"])["RAY_AUTH_TOKEN_PATH"]).read_text()

    def states_of_jobs() -> list[str]:
        answer = httpx.get(jobs, headers={"Authorization": f"Bearer {token}"}, trust_env=False, timeout=30)
        return [job["status"] for job in answer.raise_for_status().json() if job["submission_id"]]

    with waiting_flow_run(servers, seed=70, launch="ray_job") as flow_run:
        assert states_of_jobs() == ["RUNNING"]
        cancel(servers, flow_run)
        until(lambda: state_of(servers, flow_run) == "CANCELLED")
        until(lambda: states_of_jobs() == ["STOPPED"])


@pytest.mark.timeout(1800 + OUTAGE_SECONDS)
def test_flow_runs_outlive_an_outage_and_end_without_a_worker(told: list[str], suspended: str, servers: Json) -> None:
    """VILA_OUTAGE has the seconds of the outage: 15 minutes with `make faults`. One run trains all the time.

    Once the worker is dead too, nothing is left that could tell Prefect of a killed run but its lease.
    """
    trains = PacedFlowRun.start(servers, seed=73)
    with waiting_flow_run(servers, seed=71) as one, waiting_flow_run(servers, seed=72) as other:
        for step in (0, 1):
            trains.step(step)
        kill_server(servers, "prefect")
        for step in (2, 3, 4):
            time.sleep(OUTAGE_SECONDS / 3)
            trains.step(step)
        up_again(servers)
        kill_server(servers, "worker")
        for flow_run in (trains.name, one, other):
            assert processes_of(flow_run)
            assert state_of(servers, flow_run) == "RUNNING"
        cancel(servers, one)
        for process in processes_of(other):
            process.kill()
        trains.step(5)
        until(lambda: not processes_of(one))
        until(lambda: (state_of(servers, one), state_of(servers, other)) == ("CANCELLED", "CRASHED"))
    until(lambda: state_of(servers, trains.name) not in ("RUNNING", "PENDING"))
    check_as_undisturbed(trains, servers)
    up_again(servers)
    assert automations(servers) == [
        f"vila-ops: {name}" for name in (
            "cancelled flow runs have ended", "lost flow runs have crashed", "notify of failures",
            "notify of promotions",
        )
    ]  # fmt: skip


def check_as_undisturbed(trained: PacedFlowRun, servers: Json) -> None:
    """Check that a flow run is completed, and has trained what an undisturbed process trains.

    It has trained it in one go, as another try would have waited for this test.
    """
    assert state_of(servers, trained.name) == "COMPLETED"
    inputs, store = trained.inputs, trained.inputs.resources.storage.store
    made = find(Checkpoint, address_of(inputs), store=store)
    assert made is not None
    verify(made)
    assert not any(one.address == address_of(inputs).key for one in resume_folders(store))
    alone = inputs.resources.with_changes({"storage.store": f"{servers['folder']}/alone", "tracking.uri": None})
    undisturbed = train_stage(inputs.stage, inputs.model, inputs.data, inputs.init, alone)
    assert made.digest == undisturbed.digest
    assert curve_of(made) == curve_of(undisturbed)
    check_told_once(servers["at"].mlflow, address_of(inputs).key, curve_of(made))


def test_a_flow_run_that_was_claimed_and_never_started_has_crashed(told: list[str], servers: Json) -> None:
    """As where its worker was killed in between. This test's sweeper has another clock."""
    api, clock = client_of(f"{servers['at'].prefect}/api"), [0.0]
    sweeper = Sweeper(api, now=lambda: clock[0])

    def swept() -> list[str]:
        while True:
            with contextlib.suppress(httpx.HTTPStatusError):  # Prefect's sqlite is locked
                return sweeper.sweep()

    later = {"type": "SCHEDULED", "state_details": {"scheduled_time": "2100-01-01T00:00:00Z"}}
    flow_run = start_flow_run(servers, "vila-evaluate/suite", {}, state=later)
    ask(servers, "POST", f"/flow_runs/{flow_run}/set_state", {"state": {"type": "PENDING"}, "force": True})
    assert swept() == []
    clock[0] = START_SECONDS + 1
    assert swept() == [flow_run]
    until(lambda: state_of(servers, flow_run) == "CRASHED")
    until(lambda: any("or was never started" in text for text in told))


def test_a_promotion_goes_on_when_a_person_has_decided_and_people_are_told(
    first: Json, told: list[str], suspended: str, servers: Json
) -> None:
    """Prefect's server and the worker are others by then."""
    assert state_of(servers, suspended) == "PAUSED"
    body = {"run_input": {"approved": True, "reason": "it reads well"}}
    url = f"{servers['at'].prefect}/api/flow_runs/{suspended}"
    assert httpx.post(f"{url}/resume", json=body, trust_env=False).raise_for_status().json()["status"] == "ACCEPT"
    until(lambda: state_of(servers, suspended) in ("COMPLETED", "FAILED", "CRASHED"))
    assert httpx.get(url, trust_env=False).json()["state"]["name"] == "Completed"
    compared = artifacts_of(servers, suspended)["vila-comparison"]
    final = [one for one in first["metrics"] if (one["split"], one["role"]) == ("test", "model")]
    assert [(row["metric"], row["the model"].split(" ")[0]) for row in compared] == [
        (one["name"], f"{one['value']:.4g}") for one in final
    ]
    record = alias_register.read("approved", store=servers["resources"]["storage"]["store"])
    assert record.checkpoints[1].digest == first["stages"][-1]["digest"]
    (promotion,) = record.history
    subject = "approved 1 is the champion"
    until(lambda: subject in [json.loads(text)["subject"] for text in told])
    (body,) = [json.loads(text)["body"] for text in told if json.loads(text)["subject"] == subject]
    assert body.startswith(f"{promotion.reason}\nBy the flow run vila-release/")
