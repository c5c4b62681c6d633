"""The deployments: how they are run by hand and by schedules, and where those of Kubernetes go."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import prefect
import pytest

from tests.flows.flow_runs import ROOT, STAGES, Json, artifacts_of, ask, start_flow_run, state_of, until
from vila_ops import local
from vila_ops.config import load
from vila_ops.config.local import LocalServers
from vila_ops.local import deployments
from vila_ops.retrain import decisions

pytestmark = [pytest.mark.ray, pytest.mark.slow]
KUBERNETES = str(ROOT / "infra/prefect.kubernetes.yaml")


def test_prefects_command_runs_the_deployment(first: Json, servers: Json) -> None:
    env = local.env(servers["settings"])
    deployment = httpx.get(f"{env['PREFECT_API_URL']}/deployments/name/vila/full-pipeline", trust_env=False).json()
    assert [schedule["active"] for schedule in deployment["schedules"]] == [False]
    program = str(Path(sys.executable).parent / "prefect")
    files = [
        word for name in ("recipe", "resources") for word in ("--param", f"{name}={servers['folder']}/{name}.yaml")
    ]
    words = [program, "deployment", "run", "vila/full-pipeline", *files, "--watch"]
    done = subprocess.run(words, env={**os.environ, **env}, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    wanted = {"flow_runs": {"deployment_id": {"any_": [deployment["id"]]}}, "sort": "START_TIME_DESC", "limit": 1}
    (latest,) = httpx.post(f"{env['PREFECT_API_URL']}/flow_runs/filter", json=wanted, trust_env=False).json()
    assert latest["state"]["type"] == "COMPLETED"
    assert latest["id"] != first["prefect_flow_run"]


def test_a_flow_takes_a_whole_recipe_and_a_shipped_name(first: Json, servers: Json) -> None:
    """All that the whole recipe asks for is sealed; the shipped one is asked for in a window that is long over."""
    folder = servers["folder"]
    run = load(folder / "recipe.yaml", resources=folder / "resources.yaml")
    whole = {name: getattr(run, name).model_dump(mode="json") for name in ("recipe", "resources")}
    own = start_flow_run(servers, "vila-evaluate/suite", {**whole, "suite": "stage"})
    places = tuple(f"resources.storage.{name}={folder}/{name}" for name in ("store", "cache"))
    named = {"recipe": "demo", "resources": "inline", "overrides": places, "schedule": {"window_hours": 168}}
    late = {"type": "SCHEDULED", "state_details": {"scheduled_time": "2020-01-06T03:00:00Z"}}
    demo = start_flow_run(servers, "vila/full-pipeline", named, state=late)
    until(lambda: not {state_of(servers, one) for one in (own, demo)} & {"SCHEDULED", "PENDING", "RUNNING"})
    ends = [ask(servers, "GET", f"/flow_runs/{one}")["state"] for one in (own, demo)]
    assert [end["name"] for end in ends] == ["Completed", "Skipped"]
    assert ends[1]["message"].startswith("window 2020-01-06T00:00:00+00:00 of demo is ")
    rows = artifacts_of(servers, own)["vila-scores"]
    scores = {(one["name"], one["role"]): one["value"] for one in first["metrics"] if one["model"] == STAGES[-1]
              and one["suite"] == "tiny_probe"}  # fmt: skip
    assert {(row["name"], row["role"]): row["value"] for row in rows} == scores


@pytest.fixture(scope="module")
def kubernetes(servers: Json) -> LocalServers:
    """A work pool of type kubernetes, as `prefect work-pool create` makes it, and settings that deploy to it."""
    settings = LocalServers.model_validate({**servers["settings"].model_dump(), "prefect_file": KUBERNETES})
    with pytest.raises(ValueError, match="name the work pool 'kubernetes', which Prefect does not have"):
        deployments.check_work_pools(settings)
    views = Path(prefect.__file__).parent / "server/api/collections_data/views/aggregate-worker-metadata.json"
    kind = json.loads(views.read_text())["prefect-kubernetes"]["kubernetes"]
    pool = {"name": "kubernetes", "type": kind["type"], "base_job_template": kind["default_base_job_configuration"]}
    ask(servers, "POST", "/work_pools/", pool)
    ask(servers, "POST", "/work_pools/kubernetes/queues", {"name": "retrain", "concurrency_limit": 1})
    return settings


def test_the_deployments_of_kubernetes_go_to_such_a_pool(
    first: Json, kubernetes: LocalServers, servers: Json, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run has the image and the queue that the file says, in what a Kubernetes worker makes a job of."""
    assert deployments.check_work_pools(kubernetes).endswith(": kubernetes")
    monkeypatch.setenv("VILA_OPS_IMAGE", "registry.example/vila-ops:1")
    monkeypatch.chdir(ROOT)
    deployments.deploy_flows(kubernetes)
    names = {"vila/full-pipeline": "default", "vila-retrain/on-event": "retrain", "vila-release/promote": "default"}
    for name, queue in names.items():
        there = ask(servers, "GET", f"/deployments/name/{name}-kubernetes")
        assert (there["work_pool_name"], there["work_queue_name"]) == ("kubernetes", queue)
        assert there["job_variables"]["image"] == "registry.example/vila-ops:1"
        assert there["pull_steps"] == [
            {"prefect.deployments.steps.set_working_directory": {"directory": "/opt/vila-ops"}}
        ]
    assert ask(servers, "GET", "/deployments/name/vila/full-pipeline")["work_pool_name"] == "local"


@pytest.fixture
def scheduled(first: Json, servers: Json) -> Iterator[Json]:
    """The deployment with a schedule. However its test ends, no schedule is active after it."""
    deployment = ask(servers, "GET", "/deployments/name/vila-retrain/scheduled")
    yield deployment
    place = f"/deployments/{deployment['id']}"
    for one in ask(servers, "GET", place)["schedules"]:
        ask(servers, "PATCH", f"{place}/schedules/{one['id']}", {"active": False})


def test_a_schedule_starts_runs_by_itself_and_one_of_them_does_the_work_of_a_window(
    scheduled: Json, servers: Json
) -> None:
    """Two schedules that a person added start at once. What people made of schedules outlives a new deployment."""
    folder, store = servers["folder"], servers["resources"]["storage"]["store"]
    (folder / "inbox").mkdir()
    watch = {"inbox": {"kind": "jsonl", "path": f"{folder}/inbox", "render": "caption"}}
    policy = {"watch": watch, "stage": "sft", "replay": 0.5, "new_samples": 8, "min_new_samples": 4, "drift": None}
    files = {name: f"{folder}/{name}.yaml" for name in ("recipe", "resources")}
    parameters = {**files, "policy": policy, "trigger": "schedule"}
    every = {"schedule": {"interval": 15}, "active": True, "parameters": parameters}
    (ours,), place = scheduled["schedules"], f"/deployments/{scheduled['id']}"
    own, other = (one["id"] for one in ask(servers, "POST", f"{place}/schedules", [every, every]))
    completed = {"deployment_id": {"any_": [scheduled["id"]]}, "state": {"type": {"any_": ["COMPLETED"]}}}

    def ended() -> list[Json]:
        return list(ask(servers, "POST", "/flow_runs/filter", {"flow_runs": completed}))

    until(lambda: len(ended()) >= 2)
    ask(servers, "DELETE", f"{place}/schedules/{other}")
    assert {one["created_by"]["type"] for one in ended()} == {"SCHEDULE"}
    assert [name for one in ended() if (name := one["state"]["name"]) != "Skipped"] == ["Completed"]
    decided = [(one.trigger, one.decided.verdict) for _, one in decisions.history("tiny", root=store)]
    assert decided == [("schedule", "not now")]
    (worked,) = [one["id"] for one in ended() if one["state"]["name"] == "Completed"]
    page = artifacts_of(servers, worked)["vila-decision"]
    assert page.startswith("# tiny: retrain: not now\n")
    assert "| new data | no | 0 usable new training samples in 0 deliveries, new_samples is 8 |" in page

    ask(servers, "PATCH", f"{place}/schedules/{ours['id']}", {"active": True})
    ask(servers, "PATCH", f"{place}/schedules/{own}", {"active": False})
    ask(servers, "PATCH", place, {"version": "an earlier one"})
    before = {str(one["schedule"]): one["active"] for one in ask(servers, "GET", place)["schedules"]}
    with contextlib.chdir(ROOT):
        deployments.deploy_flows(servers["settings"])
    after = ask(servers, "GET", place)
    assert after["version"] == scheduled["version"]
    assert {str(one["schedule"]): one["active"] for one in after["schedules"]} == before
    assert sorted(before.values()) == [False, True]
