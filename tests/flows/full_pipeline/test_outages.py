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
from vila_ops import local
from vila_ops.pipeline.sweeper import START_SECONDS, Sweeper, client_of
from vila_ops.registry import alias_register

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
    """VILA_OUTAGE has the seconds of the outage: 15 minutes with `make faults`.

    Once the worker is dead too, nothing is left that could tell Prefect of a killed run but its lease.
    """
    with waiting_flow_run(servers, seed=71) as one, waiting_flow_run(servers, seed=72) as other:
        kill_server(servers, "prefect")
        time.sleep(OUTAGE_SECONDS)
        up_again(servers)
        kill_server(servers, "worker")
        assert all(processes_of(flow_run) and state_of(servers, flow_run) == "RUNNING" for flow_run in (one, other))
        cancel(servers, one)
        for process in processes_of(other):
            process.kill()
        until(lambda: not processes_of(one))
        until(lambda: (state_of(servers, one), state_of(servers, other)) == ("CANCELLED", "CRASHED"))
    up_again(servers)
    assert automations(servers) == [
        f"vila-ops: {name}" for name in (
            "cancelled flow runs have ended", "lost flow runs have crashed", "notify of failures",
            "notify of promotions",
        )
    ]  # fmt: skip


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
