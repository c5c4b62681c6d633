"""Two stages of the tiny recipe through Prefect, Ray, DeepSpeed, MLflow and Serve, by the command of `make demo`.

The tests at the end are about the servers themselves, which start slowly and are therefore shared.
"""

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import prefect
import psutil
import pytest
from mlflow import MlflowClient
from openai import OpenAI
from typer.testing import CliRunner

from tests.flows.demo_command import CANARY, SECRETS, command, command_lines, environment, kill_once_started
from tests.flows.flow_runs import (
    ROOT,
    STAGES,
    Json,
    artifacts_of,
    ask,
    automations,
    await_healthy,
    cancel,
    kill_server,
    pids,
    processes_of,
    start_flow_run,
    state_of,
    until,
    up_again,
    waiting_flow_run,
    written,
)  # fmt: skip
from tests.test_local import alive, content, files_below, states
from vila_ops import local
from vila_ops.cli import app
from vila_ops.config import load
from vila_ops.config.local import LocalServers
from vila_ops.local import deployments
from vila_ops.local.servers import ray_folder
from vila_ops.pipeline.explain import explain
from vila_ops.pipeline.sweeper import START_SECONDS, Sweeper, client_of
from vila_ops.registry import alias_register
from vila_ops.retrain import decisions

pytestmark = [pytest.mark.ray, pytest.mark.slow]
Demo = Callable[..., Json]
KUBERNETES = str(ROOT / "infra/prefect.kubernetes.yaml")
OUTAGE_SECONDS = float(os.environ.get("VILA_OUTAGE", "10"))


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, free_servers: Callable[[Path], LocalServers]) -> Iterator[Json]:
    """Servers of this test's own, and the files that name them. Prefect looks at its schedules every few seconds."""
    folder = tmp_path_factory.mktemp("box")
    settings = free_servers(folder / "local")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS", "5")
        yield written(folder, settings)
        local.down(settings)


@pytest.fixture(scope="module")
def demo(servers: Json) -> Demo:
    def run(*overrides: str) -> Json:
        folder = servers["folder"]
        done = subprocess.run(
            command(servers, *overrides), cwd=ROOT, env={**os.environ, **SECRETS}, capture_output=True, text=True,
            timeout=1200, check=False,
        )  # fmt: skip
        assert CANARY not in done.stdout + done.stderr
        log = folder / "local/logs/worker.log"
        assert done.returncode == 0, done.stdout + done.stderr + (log.read_text()[-4000:] if log.exists() else "")
        summary: Json = json.loads((folder / "store/tiny/summary.json").read_text())
        return summary

    return run


@pytest.fixture(scope="module")
def first(demo: Demo) -> Json:
    return demo()


def test_the_summary_says_what_really_ran(first: Json, servers: Json) -> None:
    assert first["launch"] == "ray"
    assert first["seconds"] > 0
    assert [stage["name"] for stage in first["stages"]] == [*STAGES]
    for stage in first["stages"]:
        assert stage["steps"] == 6
        assert len(stage["digest"]) == 64
        assert len(stage["mlflow_run"]) == 32
        losses = ("loss_first", "loss_last", "validation_first", "validation_last")
        assert all(isinstance(stage[key], float) for key in ("seconds", *losses))
        assert [worker["rank"] for worker in stage["workers"]] == [0, 1]
        for worker in stage["workers"]:
            assert worker["engine"].startswith("deepspeed")
            assert worker["zero_stage"] == 2
            assert worker["world_size"] == 2
            assert worker["actor"]
    assert [(task["task"], task["name"]) for task in first["tasks"]] == [
        ("assemble", "base"), *[("prepare", f"tiny_{name}") for name in ("held_out", *STAGES)],
        *[("train_stage", name) for name in STAGES],
        *[("evaluate", f"{name} on tiny_probe") for name in ("base", *STAGES)],
        ("evaluate", "sft on tiny"),
        ("register", "tiny 1"), ("deploy", servers["at"].serve),
    ]  # fmt: skip
    for task in first["tasks"]:
        assert task["seconds"] > 0
        assert len(task["digest"]) == 64
        if task["task"] in ("prepare", "train_stage", "evaluate"):
            assert {worker["launch"] for worker in task["workers"]} == {"ray"}
            assert all(worker["node"] and worker["pid"] for worker in task["workers"])
    assert first["answer"]["reply"]
    assert first["mlflow"]["version"] == 1
    assert first["serving"]["model"] == first["answer"]["model"] == first["stages"][-1]["digest"]
    assert first["serving"]["replica"]["actor_id"]
    assert first["serving"]["replica"]["node_id"]
    ran = ("torch", "transformers", "deepspeed", "ray", "mlflow", "prefect", "dvc")
    ran += ("numpy", "pyarrow", "pillow", "pydantic")
    assert first["versions"] == {name: version(name) for name in ran}
    asked = httpx.get(f"{servers['at'].prefect}/api/flow_runs/{first['prefect_flow_run']}").json()
    assert asked["state"]["type"] == "COMPLETED"


def test_every_metric_has_an_interval_for_model_control_and_chance(first: Json) -> None:
    controlled = ("caption_loss", "multiple_choice", "multiple_choice_margin", "cider", "alignment")
    probes = [(model, "validation") for model in ("base", *STAGES)]
    for model in (*probes, ("sft", "test")):
        metrics = [metric for metric in first["metrics"] if (metric["model"], metric["split"]) == model]
        assert {(metric["name"], metric["role"]) for metric in metrics} == {
            *((name, role) for name in controlled for role in ("model", "control", "gap")),
            *((name, "control") for name in ("pope_accuracy", "pope_f1", "pope_yes_ratio")),
            *((name, "chance") for name in ("multiple_choice", "cider", "text_multiple_choice")),
            *((name, "chance") for name in ("pope_accuracy", "pope_f1", "pope_yes_ratio")),
            ("text_loss", "model"),
            ("alignment_margin", "model"),
            *((name, "model") for name in ("pope_accuracy", "pope_f1", "pope_yes_ratio", "text_multiple_choice")),
        }
        assert all(metric["low"] <= metric["value"] <= metric["high"] and metric["n"] for metric in metrics)


def test_mlflow_has_the_runs_and_the_champion(first: Json, servers: Json) -> None:
    client = MlflowClient(servers["at"].mlflow, registry_uri=servers["at"].mlflow)
    parent = client.get_run(first["mlflow"]["parent_run"])
    assert parent.info.status == "FINISHED"
    assert parent.data.params["stages.sft.mixture.sources.instructions.weight"] == "0.5"
    final = {metric["name"]: metric["value"] for metric in first["metrics"] if metric["split"] == "test"
             and metric["role"] == "model"}  # fmt: skip
    assert {name: parent.data.metrics[name] for name in final} == pytest.approx(final)
    children = client.search_runs([parent.info.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
    assert sorted(run.info.run_name for run in children) == sorted(
        [*STAGES, "evaluate sft on tiny"] + [f"evaluate {name} on tiny_probe" for name in ("base", *STAGES)]
    )
    trained = next(run for run in children if run.info.run_name == "sft")
    assert len(client.get_metric_history(trained.info.run_id, "loss")) == 6
    champion = client.get_model_version_by_alias("tiny", "champion")
    assert champion.tags["digest"] == first["stages"][-1]["digest"]


def test_the_page_of_a_run_says_what_ran_and_what_it_took(first: Json, servers: Json) -> None:
    """The first run of an empty store: everything ran. Its costs are those of the manifests."""
    shown = artifacts_of(servers, first["prefect_flow_run"])
    assert shown["vila-progress"] == 100.0
    plan = shown["vila-plan"]
    assert {row["status"] for row in plan} == {"runs", "reconciles"}
    assert all(row["why"] for row in plan)
    *costs, total = shown["vila-cost"]
    sealing = [task for task in first["tasks"] if task["reused"] is not None]
    assert [(row["task"], row["name"]) for row in costs] == [(task["task"], task["name"]) for task in sealing]
    assert total["minutes"] == pytest.approx(sum(task["seconds"] for task in sealing) / 60, abs=0.05)
    models = shown["vila-models"]
    assert set(models[0]) == {"metric", "base", *STAGES}
    probed = {one["name"] for one in first["metrics"] if one["suite"] == "tiny_probe" and one["role"] == "model"}
    assert {row["metric"] for row in models} == probed


def test_prefects_artifacts_link_to_mlflow(first: Json, servers: Json) -> None:
    said = artifacts_of(servers, first["prefect_flow_run"])
    assert f"({first['mlflow']['page']})" in said["vila-report"]
    assert f"/runs/{first['mlflow']['parent_run']}?" in first["mlflow"]["page"]
    assert first["mlflow"]["page"].startswith(first["mlflow"]["runs"].partition("?")[0])
    curves = [f"[curves]({stage['mlflow_page']})" for stage in first["stages"]]
    assert [row["MLflow"] for row in said["vila-stages"]] == curves


def test_the_official_client_gets_an_answer(first: Json) -> None:
    client = OpenAI(base_url=f"{first['answer']['url']}/v1", api_key="none")
    said = client.chat.completions.create(
        model=first["answer"]["name"], messages=[{"role": "user", "content": "hello"}], max_tokens=4
    )
    assert said.system_fingerprint == first["stages"][-1]["digest"]


def test_a_killed_demo_is_gone_on_with_and_makes_exactly_what_depends_on_its_change(
    first: Json, demo: Demo, servers: Json
) -> None:
    changed = "final_suite.bootstrap_resamples=100"
    killed = kill_once_started(servers, changed)
    again = demo(changed)
    assert again["prefect_flow_run"] == killed
    made = {(task["task"], task["name"]) for task in again["tasks"] if task["reused"] is False}
    assert made == {("evaluate", "sft on tiny")}


def test_a_killed_demo_of_another_run_is_ended_and_an_unchanged_run_makes_nothing(
    first: Json, demo: Demo, servers: Json
) -> None:
    killed = kill_once_started(servers, "stages.sft.learning_rate=4e-4")
    before = httpx.get(f"{servers['at'].serve}/health").json()
    unchanged = demo()
    assert httpx.get(f"{servers['at'].serve}/health").json()["replica"] == before["replica"]
    sealing = [task for task in unchanged["tasks"] if task["task"] not in ("register", "deploy")]
    assert all(task["reused"] for task in sealing)
    assert [task["digest"] for task in sealing] == [task["digest"] for task in first["tasks"][: len(sealing)]]
    assert unchanged["prefect_flow_run"] != killed
    asked = httpx.get(f"{servers['at'].prefect}/api/flow_runs/{killed}").json()
    assert asked["state"]["type"] == "CANCELLED"


def test_an_unchanged_flow_imports_nothing_heavy(first: Json, servers: Json) -> None:
    program = (
        "import sys; from flows.full_pipeline import vila; vila(sys.argv[1], sys.argv[2]);"
        "heavy = {'torch', 'ray', 'transformers'} & set(sys.modules); assert not heavy, heavy"
    )
    files = [str(servers["folder"] / f"{name}.yaml") for name in ("recipe", "resources")]
    command = [sys.executable, "-c", program, *files]
    env = {**os.environ, **local.env(servers["settings"])}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def told(first: Json, servers: Json) -> Iterator[list[str]]:
    """What people are told, by a block of Prefect that calls a server of this test."""
    texts: list[str] = []

    class Inbox(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            texts.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    from prefect.blocks.notifications import CustomWebhookNotificationBlock
    from prefect.settings import temporary_settings

    with ThreadingHTTPServer(("127.0.0.1", 0), Inbox) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with temporary_settings({"PREFECT_API_URL": f"{servers['at'].prefect}/api"}):
            url = f"http://127.0.0.1:{server.server_port}"
            data = {"subject": "{{subject}}", "body": "{{body}}"}
            CustomWebhookNotificationBlock(name="test", url=url, json_data=data).save("vila-ops")
        until(lambda: len(automations(servers)) == 4)
        yield texts
        server.shutdown()


def test_a_corrupted_shard_is_named_and_not_tried_again(
    first: Json, told: list[str], demo: Demo, servers: Json
) -> None:
    (dataset,) = [task["digest"] for task in first["tasks"] if task["name"] == "tiny_sft"]
    manifests = (servers["folder"] / "store/dataset").glob("*/manifest.json")
    sealed = next(path for path in manifests if json.loads(path.read_text())["digest"] == dataset)
    shard = next((sealed.parent / json.loads(sealed.read_text())["data"]).glob("*.tar"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    failed = subprocess.run(
        command(servers, "stages.sft.seed=9"), cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False
    )
    shard.write_bytes(content)
    assert failed.returncode == 1
    assert "CorruptArtifact" in failed.stderr
    assert str(shard) in failed.stderr
    wanted = {"flow_runs": {"state": {"type": {"any_": ["FAILED"]}}}}
    tasks = httpx.post(f"{servers['at'].prefect}/api/task_runs/filter", json=wanted).json()
    (trained,) = [task for task in tasks if task["name"] == "train sft"]
    assert trained["run_count"] == 1
    until(lambda: bool(told))
    assert "is Failed" in told[0]
    assert str(shard) in told[0]


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


def test_a_schedule_starts_runs_by_itself_and_one_of_them_does_the_work_of_a_window(first: Json, servers: Json) -> None:
    """Two schedules that a person added start at once. What people made of schedules outlives a new deployment."""
    folder, store = servers["folder"], servers["resources"]["storage"]["store"]
    (folder / "inbox").mkdir()
    watch = {"inbox": {"kind": "jsonl", "path": f"{folder}/inbox", "render": "caption"}}
    policy = {"watch": watch, "stage": "sft", "replay": 0.5, "new_samples": 8, "min_new_samples": 4, "drift": None}
    files = {name: f"{folder}/{name}.yaml" for name in ("recipe", "resources")}
    parameters = {**files, "policy": policy, "trigger": "schedule"}
    every = {"schedule": {"interval": 15}, "active": True, "parameters": parameters}
    deployment = ask(servers, "GET", "/deployments/name/vila-retrain/scheduled")
    (ours,), place = deployment["schedules"], f"/deployments/{deployment['id']}"
    own, other = (one["id"] for one in ask(servers, "POST", f"{place}/schedules", [every, every]))
    completed = {"deployment_id": {"any_": [deployment["id"]]}, "state": {"type": {"any_": ["COMPLETED"]}}}

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
    assert after["version"] == deployment["version"]
    assert {str(one["schedule"]): one["active"] for one in after["schedules"]} == before
    assert sorted(before.values()) == [False, True]


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


def test_mlflow_stores_below_root(servers: Json) -> None:
    path = f"{servers['at'].mlflow}/api/2.0/mlflow-artifacts/artifacts/0/hello.txt"
    assert httpx.put(path, content=b"hello", trust_env=False).is_success
    root = Path(servers["settings"].root)
    assert (root / "mlflow-artifacts/0/hello.txt").read_bytes() == b"hello"
    assert (root / "mlflow.db").is_file()


def test_ray_asks_for_the_token(first: Json, servers: Json) -> None:
    jobs = f"{servers['at'].ray_dashboard}/api/jobs/"
    token = Path(local.env(servers["settings"])["RAY_AUTH_TOKEN_PATH"])
    assert token.stat().st_mode & 0o077 == 0
    assert httpx.get(jobs, trust_env=False).status_code == 401
    assert httpx.get(jobs, headers={"Authorization": f"Bearer {token.read_text()}"}, trust_env=False).is_success


def test_no_secret_is_in_any_file_page_or_list_of_processes(first: Json, servers: Json) -> None:
    """Of all that ran until here: logs, databases, records, artifacts, checkpoints, pages, and Ray's own folder."""
    folder, at = servers["folder"], servers["at"]
    folders = (folder, ray_folder(servers["settings"]))
    token = Path(local.env(servers["settings"])["RAY_AUTH_TOKEN_PATH"])
    files = [path for path in files_below(*folders) if path != token]
    assert {"worker.log", "mlflow.db", "prefect.db", "model.safetensors", "report.html"} <= {
        path.name for path in files
    }
    assert any("worker-" in path.name for path in files if path.is_relative_to(folders[1])), "logs of Ray's workers"
    wanted = (CANARY.encode(), token.read_bytes().strip())
    assert [path for path in files if any(text in content(path) for text in wanted)] == []
    shown = [" ".join(words) for words in command_lines()]
    assert [words for words in shown if any(text.decode() in words for text in wanted)] == []
    for url in (f"{at.serve}/v1/nothing", f"{at.mlflow}/api/nothing", f"{at.prefect}/api/nothing", at.ray_dashboard):
        assert CANARY not in httpx.get(url, trust_env=False).text
    there = {process.pid for process in psutil.process_iter() if CANARY in str(environment(process))}
    assert set(pids(servers["settings"]).values()) & there, "the servers do have the secrets"


def test_a_second_up_adopts_every_server(first: Json, servers: Json) -> None:
    await_healthy(servers["settings"])
    before = pids(servers["settings"])
    with contextlib.chdir(ROOT):
        local.up(servers["settings"])
    assert pids(servers["settings"]) == before


def test_up_replaces_what_was_killed_or_is_configured_otherwise_and_nothing_else(first: Json, servers: Json) -> None:
    settings = servers["settings"]
    before = pids(settings)
    assert before["ray"] is not None
    os.kill(before["ray"], signal.SIGKILL)  # its agents live on, with the ports that the next head needs
    other = LocalServers.model_validate({**settings.model_dump(), "max_flow_runs": settings.max_flow_runs + 1})
    with contextlib.chdir(ROOT):
        local.up(other)
    after = pids(other)
    await_healthy(other)
    assert {name for name in before if before[name] != after[name]} == {"ray", "worker"}


def backup_words(servers: Json) -> list[str]:
    files = {"-r": "resources.yaml", "--servers": "local.yaml"}
    return [
        f"{servers['folder']}/backup",
        *(word for option, name in files.items() for word in (option, f"{servers['folder']}/{name}")),
    ]


def rows(database: Path, table: str, key: str) -> set[str]:
    with contextlib.closing(sqlite3.connect(database)) as opened:
        return {row[0] for row in opened.execute(f"SELECT {key} FROM {table}")}


@pytest.fixture(scope="module")
def backed_up(first: Json, servers: Json) -> Json:
    """A backup that was made while the servers ran, and what their databases had."""
    made = CliRunner().invoke(app, ["backup", *backup_words(servers), "--json"], catch_exceptions=False)
    root = Path(servers["settings"].root)
    return {
        **json.loads(made.stdout),
        "runs": rows(root / "mlflow.db", "runs", "run_uuid"),
        "flow_runs": rows(root / "prefect/prefect.db", "flow_run", "id"),
    }


def test_a_backup_is_made_while_the_servers_run(backed_up: Json, servers: Json) -> None:
    assert states(servers["settings"]) <= {"healthy", "unhealthy"}
    assert backed_up["databases"] == ["mlflow.db", "prefect.db"]
    assert backed_up["num_artifacts"] == backed_up["num_copied"] > 0


def test_down_leaves_no_process_of_ours(first: Json, servers: Json) -> None:
    settings = servers["settings"]
    records = [json.loads(path.read_text()) for path in Path(settings.root, "pids").iterdir()]
    sessions = {record["pid"] for record in records}
    ours = [pid for pid in psutil.pids() if psutil.pid_exists(pid) and os.getsid(pid) in sessions]
    assert len(ours) > len(sessions)
    ray_folder = Path(next(record["command"][-1] for record in records if record["name"] == "ray"))
    assert ray_folder.is_dir()
    local.down(settings)
    assert [pid for pid in (*ours, *(record["log_writer"][0] for record in records)) if alive(pid)] == []
    assert states(settings) == {"stopped"}
    assert not ray_folder.exists()


def test_a_lost_machine_is_restored_and_an_unchanged_run_would_make_nothing(backed_up: Json, servers: Json) -> None:
    """Store, databases and MLflow's artifacts are gone; the servers are down."""
    root, store = Path(servers["settings"].root), Path(servers["resources"]["storage"]["store"])
    local.down(servers["settings"])
    assert states(servers["settings"]) == {"stopped"}
    shutil.rmtree(root)
    shutil.rmtree(store)
    restored = CliRunner().invoke(app, ["restore", *backup_words(servers), "--json"], catch_exceptions=False)
    assert json.loads(restored.stdout)["num_artifacts"] == backed_up["num_artifacts"]
    with contextlib.chdir(ROOT):
        steps = explain(load(servers["folder"] / "recipe.yaml", resources=servers["folder"] / "resources.yaml"))
    assert {step.status for step in steps} == {"sealed", "reconciles"}
    assert rows(root / "mlflow.db", "runs", "run_uuid") == backed_up["runs"]
    assert rows(root / "prefect/prefect.db", "flow_run", "id") == backed_up["flow_runs"]
    assert (root / "mlflow-artifacts/0/hello.txt").read_bytes() == b"hello"
    assert alias_register.read("tiny", store=str(store)).checkpoints
