"""When the sweeper says that a flow run is lost. Prefect's answers are given here; tests/flows asks a real server."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.forks import Fork
from vila_ops.artifacts.leases import hold
from vila_ops.errors import ClusterUnreachable
from vila_ops.pipeline.automations import CANCELLED, LOST, automations
from vila_ops.pipeline.sweeper import ATTEMPT, JOB, JOB_SERVER, LABEL, WORKER, Sweeper, client_of, lease_of
from vila_ops.train.stage import FollowedJob

Json = dict[str, Any]
AT_MOST = 200
"""Prefect's answer has no more flow runs than this (PREFECT_SERVER_API_DEFAULT_LIMIT)."""
HELD_AND_KILLED = """
import os, signal, sys
from vila_ops.artifacts.leases import hold
from vila_ops.errors import ClusterUnreachable
from vila_ops.pipeline.sweeper import lease_of
with hold(lease_of("a"), store=sys.argv[1]):
    os.kill(os.getpid(), signal.SIGKILL)
"""


class Prefect:
    """Answers as Prefect's API does about flow runs and automations, and keeps the events that it gets."""

    def __init__(self, store: str) -> None:
        self.states = {"a": "RUNNING"}
        self.facts: Json = {}
        """What is known of a flow run beside its state and its store."""
        self.between: dict[str, str] = {}
        """States after the first page of flow runs."""
        self.events: list[Json] = []
        self.automations: list[Json] = []
        self.blocks: list[Json] = []
        self.store, self.calls = store, 0

    def flow_run(self, name: str) -> Json:
        state = {"type": self.states[name], "id": f"{name} {self.states[name]}"}
        facts = {"labels": {LABEL: self.store}, "tags": [], "infrastructure_pid": None, **self.facts}
        return {"id": name, "name": name, "state": state, **facts}

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path, body = request.url.path.removeprefix("/api"), json.loads(request.content or b"null")
        if path == "/flow_runs/filter":
            wanted, known = body["flow_runs"]["state"]["type"]["any_"], body["flow_runs"]["id"]["not_any_"]
            found = [one for one in sorted(self.states) if self.states[one] in wanted and one not in known]
            listed = [self.flow_run(one) for one in found[:AT_MOST]]
            self.states |= self.between
            return httpx.Response(200, json=listed)
        if path.startswith("/flow_runs/"):
            return httpx.Response(200, json=self.flow_run(path.rpartition("/")[2]))
        if path == "/events":
            self.events += body
        elif path == "/block_documents/filter":
            return httpx.Response(200, json=self.blocks)
        elif path == "/automations/filter":
            return httpx.Response(200, json=self.automations)
        elif request.method == "POST":
            self.automations.append({**body, "id": f"{len(self.automations)}", "enabled": True})
        elif request.method == "PUT":
            self.automations = [{**one, **body} if path.endswith(one["id"]) else one for one in self.automations]
        elif request.method == "DELETE":
            self.automations = [one for one in self.automations if not path.endswith(one["id"])]
        return httpx.Response(204)


@pytest.fixture
def prefect(tmp_path: Path) -> Prefect:
    return Prefect(f"{tmp_path}/store")


def sweeper(prefect: Prefect, now: Callable[[], float]) -> Sweeper:
    api = httpx.Client(base_url="http://prefect/api", transport=httpx.MockTransport(prefect))
    return Sweeper(api, silent_seconds=180, now=now)


def test_a_run_whose_process_was_killed_is_told_once_and_again_if_nothing_happens(prefect: Prefect) -> None:
    clock = [0.0]
    sweep = sweeper(prefect, lambda: clock[0]).sweep
    with hold(lease_of("a"), store=prefect.store):
        assert sweep() == []
    with Fork("-c", HELD_AND_KILLED, prefect.store) as process:
        assert process.wait() == -signal.SIGKILL
    assert [sweep(), sweep()] == [["a"], []]
    (event,) = prefect.events
    assert (event["event"], event["resource"]["prefect.resource.id"]) == (LOST, "prefect.flow-run.a")
    clock[0] = 61.0
    prefect.states["a"] = "CANCELLING"
    assert sweep() == ["a"]
    assert prefect.events[-1]["event"] == CANCELLED
    prefect.states["a"] = "CRASHED"
    clock[0] = 600.0
    assert sweep() == []


@pytest.mark.parametrize("fault", [None, ClusterUnreachable("the job server does not answer")])
@pytest.mark.parametrize("state", ["CANCELLING", "RUNNING"])
def test_the_job_of_a_cancelled_run_without_a_process_is_stopped(
    prefect: Prefect, state: str, fault: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that crashed is run again, and follows the job that goes on."""
    stopped: list[FollowedJob] = []

    def stop_job(job: FollowedJob) -> None:
        stopped.append(job)
        if fault is not None:
            raise fault

    monkeypatch.setattr("vila_ops.pipeline.sweeper.stop_job", stop_job)
    labels = {LABEL: prefect.store, JOB: "0123", JOB_SERVER: "http://head"}
    prefect.states["a"], prefect.facts = state, {"labels": labels}
    clock = [0.0]
    sweep = sweeper(prefect, lambda: clock[0]).sweep
    assert (sweep(), stopped) == ([], [])
    clock[0] = 181.0
    assert sweep() == ["a"]
    assert stopped == [FollowedJob("0123", "http://head")] * (state == "CANCELLING")
    assert [event["event"] for event in prefect.events] == [CANCELLED if state == "CANCELLING" else LOST]


def test_every_running_flow_run_is_looked_at_however_many_there_are(prefect: Prefect) -> None:
    """None has a lease; of those that have ended meanwhile nothing is told."""
    clock = [0.0]
    sweep = sweeper(prefect, lambda: clock[0]).sweep
    running = {f"run-{number:03}" for number in range(2 * AT_MOST + 1)}
    prefect.states = {**dict.fromkeys(running, "RUNNING"), "ended": "COMPLETED"}
    assert sweep() == []
    clock[0] = 181.0
    assert set(sweep()) == running
    assert len(prefect.events) == len(running)


@pytest.mark.parametrize("state", ["RUNNING", "COMPLETED"])
def test_a_flow_run_that_begins_or_ends_between_two_pages_hides_no_other_one(prefect: Prefect, state: str) -> None:
    """It sorts before all others, whose places it moves. One that is skipped is silent only from the next look on."""
    clock = [0.0]
    sweep = sweeper(prefect, lambda: clock[0]).sweep
    running = {f"run-{number:03}" for number in range(AT_MOST + 2)}
    prefect.states = {**dict.fromkeys(running, "RUNNING"), "first": "RUNNING" if state == "COMPLETED" else "SCHEDULED"}
    prefect.between = {"first": state}
    assert sweep() == []
    clock[0] = 181.0
    assert set(sweep()) == running | ({"first"} if state == "RUNNING" else set())


def test_only_silence_that_was_watched_counts(prefect: Prefect, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder is of another machine. Its store, then Prefect, then the sweeper itself are away for an hour each."""
    clock = [0.0]
    one = sweeper(prefect, lambda: clock[0])
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    with hold(lease_of("a"), store=prefect.store) as lease:
        monkeypatch.undo()
        assert one.sweep() == []
        os.rename(prefect.store, f"{prefect.store}-away")
        Path(prefect.store).write_text("a file in place of the folder")
        clock[0] += 3600
        assert one.sweep() == []
        os.unlink(prefect.store)
        os.rename(f"{prefect.store}-away", prefect.store)
        assert one.sweep() == []
        clock[0] += 100
        assert one.sweep() == []
        lease.heartbeat()
        clock[0] += 3600
        assert one.sweep() == []  # there was a heartbeat since the last look
        clock[0] += 181
        assert one.sweep() == ["a"]


@pytest.mark.parametrize("name", ["PREFECT_API_AUTH_STRING", "PREFECT_API_KEY"])
def test_prefect_gets_the_credentials_that_its_own_client_sends(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.client.orchestration import get_client  # heavy
    from prefect.settings import temporary_settings

    monkeypatch.setenv(name, "admin:secret")
    with temporary_settings({name: "admin:secret", "PREFECT_API_URL": "http://prefect/api"}):
        stock = get_client(sync_client=True)
        assert client_of("http://prefect/api").headers["Authorization"] == stock._client.headers["Authorization"]


@pytest.mark.parametrize(
    ("facts", "ours"),
    [
        ({"tags": ["vila"]}, True),
        ({"tags": ["vila"], "infrastructure_pid": "7", "labels": {WORKER: "process"}}, True),
        ({"tags": ["vila"], "infrastructure_pid": "job", "labels": {WORKER: "kubernetes"}}, False),
        ({"tags": ["other"]}, False),
    ],
)
@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "CANCELLING"])
def test_a_run_whose_worker_was_killed_before_its_process_had_a_lease_is_lost_after_twenty_minutes(
    prefect: Prefect, state: str, facts: Json, ours: bool
) -> None:
    """A job that a cluster was given may wait for a place, and starts without its worker."""
    clock = [0.0]
    sweep = sweeper(prefect, lambda: clock[0]).sweep
    prefect.states, prefect.facts = {"a": state}, {"labels": {}, **facts}
    assert sweep() == []
    clock[0] = 1200.0
    assert sweep() == []
    clock[0] = 1201.0
    assert sweep() == (["a"] if ours else [])
    assert [one["event"] for one in prefect.events] == [CANCELLED if state == "CANCELLING" else LOST] * ours


def test_a_run_that_starts_late_is_not_lost(prefect: Prefect) -> None:
    """It is Running when the sweeper looks once more, before it tells of it."""
    clock = [0.0]
    sweep = sweeper(prefect, lambda: clock[0]).sweep
    prefect.states, prefect.facts = {"a": "PENDING"}, {"labels": {}, "tags": ["vila"]}
    assert sweep() == []
    clock[0], prefect.between = 1201.0, {"a": "RUNNING"}
    assert sweep() == []
    clock[0] = 2401.0
    assert sweep() == []
    clock[0] = 2402.0 + 1200.0
    assert sweep() == ["a"]


def test_the_lease_of_a_killed_attempt_says_nothing_of_the_next_one(prefect: Prefect) -> None:
    """A person runs a crashed flow run again: it has the label and the lease of its former attempt until it begins."""
    sweep = sweeper(prefect, lambda: 0.0).sweep
    with Fork("-c", HELD_AND_KILLED, prefect.store) as process:
        assert process.wait() == -signal.SIGKILL
    prefect.facts = {"labels": {LABEL: prefect.store, ATTEMPT: "a state before"}, "tags": ["vila"]}
    for state in ("PENDING", "RUNNING"):
        prefect.states["a"] = state
        assert sweep() == []
    prefect.facts["labels"][ATTEMPT] = prefect.flow_run("a")["state"]["id"]
    assert sweep() == ["a"]


def test_automations_are_made_once_changed_when_ours_change_and_stay_off_when_a_person_switched_them_off(
    prefect: Prefect,
) -> None:
    prefect.states.clear()
    for _ in range(2):
        sweeper(prefect, lambda: 0.0).sweep()
    assert [one["name"] for one in prefect.automations] == [one["name"] for one in automations([])]
    prefect.automations[0] |= {"enabled": False, "description": "of an earlier version", "actions": []}
    prefect.automations.append({**prefect.automations[1], "id": "9"})  # two sweepers began at once
    sweeper(prefect, lambda: 0.0).sweep()
    assert [one["id"] for one in prefect.automations] == ["0", "1"]
    assert prefect.automations[0]["actions"] == automations([])[0]["actions"]
    assert not prefect.automations[0]["enabled"]


def test_people_are_notified_from_the_next_look_on_once_prefect_has_a_block_for_it(prefect: Prefect) -> None:
    prefect.states.clear()
    clock = [0.0]
    sweep = sweeper(prefect, lambda: clock[0]).sweep
    sweep()
    prefect.blocks = [{"id": "one"}]
    sweep()
    assert len(prefect.automations) == 2
    clock[0] = 30.0
    sweep()
    assert [one["name"] for one in prefect.automations[2:]] == [
        "vila-ops: notify of failures", "vila-ops: notify of promotions",
    ]  # fmt: skip
    actions = [action for one in prefect.automations[2:] for action in one["actions"]]
    assert {(action["type"], action["block_document_id"]) for action in actions} == {("send-notification", "one")}
