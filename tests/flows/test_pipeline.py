"""The tiny recipe through Prefect, Ray, DeepSpeed, MLflow and Serve, by the command that `make demo` runs."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from mlflow import MlflowClient
from openai import OpenAI

from vila_ops import local
from vila_ops.config.local import LocalServers

ROOT = Path(__file__).parents[2]
PROGRAM = str(Path(sys.executable).parent / "vila-ops")
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
Json = dict[str, Any]
Demo = Callable[..., Json]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, free_servers: Callable[[Path], LocalServers]) -> Iterator[Json]:
    """Servers of this test's own, and the files that name them."""
    folder = tmp_path_factory.mktemp("box")
    settings = free_servers(folder / "local")
    resources = {
        "launch": "ray",
        "ray_address": local.endpoints(settings).ray,
        "tracking_uri": local.endpoints(settings).mlflow,
        "prefect_page": local.endpoints(settings).prefect,
        "serve_port": settings.serve_port,
        "num_workers": 2,
        "zero_stage": 2,
        "store": str(folder / "store"),
        "cache": str(folder / "cache"),
    }
    (folder / "resources.yaml").write_text(yaml.safe_dump(resources))
    (folder / "local.yaml").write_text(yaml.safe_dump(settings.model_dump()))
    yield {"folder": folder, "settings": settings, "resources": resources}
    local.down(settings)


def command(servers: Json, *overrides: str) -> list[str]:
    """The demo on this test's own servers."""
    files = ["-r", str(servers["folder"] / "resources.yaml"), "--servers", str(servers["folder"] / "local.yaml")]
    sets = [word for override in overrides for word in ("-s", override)]
    return [PROGRAM, "demo", "configs/recipes/tiny.yaml", *files, *sets]


def kill_once_started(servers: Json, *overrides: str) -> str:
    """SIGKILL to a demo as soon as its flow run is there; returns the flow run's id."""
    with subprocess.Popen(command(servers, *overrides), cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = next(line for line in process.stdout if line.startswith("flow run "))
        process.kill()
    return said.strip().rpartition("/")[2]


@pytest.fixture(scope="module")
def demo(servers: Json) -> Demo:
    def run(*overrides: str) -> Json:
        folder = servers["folder"]
        done = subprocess.run(
            command(servers, *overrides), cwd=ROOT, capture_output=True, text=True, timeout=800, check=False
        )
        log = folder / "local/logs/worker.log"
        assert done.returncode == 0, done.stdout + done.stderr + (log.read_text()[-4000:] if log.exists() else "")
        summary: Json = json.loads((folder / "store/tiny/summary.json").read_text())
        return summary

    return run


@pytest.fixture(scope="module")
def first(demo: Demo) -> Json:
    return demo()


def test_the_summary_says_what_really_ran(first: Json, servers: Json) -> None:
    assert [stage["name"] for stage in first["stages"]] == ["align", "pretrain", "sft"]
    for stage in first["stages"]:
        assert stage["steps"] == 6
        assert len(stage["digest"]) == 64
        assert all(isinstance(stage[key], float) for key in ("seconds", "loss_first", "validation_last"))
        assert [worker["rank"] for worker in stage["workers"]] == [0, 1]
        for worker in stage["workers"]:
            assert worker["engine"].startswith("deepspeed")
            assert worker["zero_stage"] == 2
            assert worker["world_size"] == 2
            assert worker["node"]
            assert worker["actor"]
    ran = [worker for room in first["rooms"] if room["room"] != "assemble" for worker in room["workers"]]
    assert {worker["launch"] for worker in ran} == {"ray"}
    assert all(worker["node"] and worker["pid"] for worker in ran)
    assert all(room["seconds"] > 0 for room in first["rooms"])
    assert first["serving"]["model"] == first["answer"]["model"] == first["stages"][-1]["digest"]
    assert first["serving"]["replica"]["actor_id"]
    assert first["versions"]["deepspeed"]
    asked = httpx.get(f"{servers['resources']['prefect_page']}/api/flow_runs/{first['prefect_flow_run']}").json()
    assert asked["state"]["type"] == "COMPLETED"


def test_every_metric_has_an_interval_for_model_control_and_chance(first: Json) -> None:
    final = [metric for metric in first["metrics"] if metric["model"] == "sft"]
    roles = {(metric["name"], metric["role"]) for metric in final}
    for name in ("multiple_choice", "cider", "pope_accuracy", "pope_f1"):
        assert {(name, role) for role in ("model", "control", "chance")} <= roles
    assert {("caption_loss", role) for role in ("model", "control", "gap")} <= roles
    assert {metric["model"] for metric in first["metrics"]} == {"base", "align", "pretrain", "sft"}
    assert all(metric["low"] <= metric["value"] <= metric["high"] and metric["n"] for metric in first["metrics"])


def test_mlflow_has_the_runs_and_the_champion(first: Json, servers: Json) -> None:
    client = MlflowClient(servers["resources"]["tracking_uri"], registry_uri=servers["resources"]["tracking_uri"])
    children = client.search_runs(
        [client.get_experiment_by_name("vila").experiment_id],
        f"tags.mlflow.parentRunId = '{first['mlflow']['parent_run']}'",
    )
    assert sorted(run.info.run_name for run in children) == sorted(
        ["align", "pretrain", "sft", *(f"evaluate {name}" for name in ("base", "align", "pretrain", "sft"))]
    )
    trained = next(run for run in children if run.info.run_name == "sft")
    assert len(client.get_metric_history(trained.info.run_id, "loss")) == 6
    champion = client.get_model_version_by_alias("tiny", "champion")
    assert champion.tags["digest"] == first["stages"][-1]["digest"]


def test_the_official_client_gets_an_answer(first: Json) -> None:
    client = OpenAI(base_url=f"{first['answer']['url']}/v1", api_key="none")
    said = client.chat.completions.create(
        model=first["answer"]["name"], messages=[{"role": "user", "content": "hello"}], max_tokens=4
    )
    assert said.system_fingerprint == first["stages"][-1]["digest"]


def test_an_unchanged_run_makes_nothing_and_imports_nothing_heavy(first: Json, demo: Demo, servers: Json) -> None:
    again = demo()
    assert all(room["reused"] for room in again["rooms"])
    assert [room["digest"] for room in again["rooms"]] == [room["digest"] for room in first["rooms"]]
    program = (
        "import sys; from pathlib import Path; from vila_ops.config import load; from vila_ops import pipeline;"
        "run = load(Path('configs/recipes/tiny.yaml'), resources=Path(sys.argv[1]));"
        "pipeline.run_pipeline(run, pipeline.Rooms());"
        "heavy = {'torch', 'ray', 'transformers'} & set(sys.modules); assert not heavy, heavy"
    )
    command = [sys.executable, "-c", program, str(servers["folder"] / "resources.yaml")]
    env = {**os.environ, **local.env(servers["settings"])}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_one_changed_weight_makes_exactly_what_depends_on_it(first: Json, demo: Demo) -> None:
    changed = demo("stages.sft.mixture.sources.instructions.weight=0.25")
    made = {(room["room"], room["name"]) for room in changed["rooms"] if not room["reused"]}
    assert made == {("prepare", "tiny_sft"), ("train_stage", "sft"), ("evaluate", "sft")}


def test_a_killed_demo_is_gone_on_with_and_another_one_is_ended(first: Json, demo: Demo, servers: Json) -> None:
    killed = kill_once_started(servers, "stages.sft.learning_rate=3e-4")
    again = demo("stages.sft.learning_rate=3e-4")
    assert again["prefect_flow_run"] == killed

    other = kill_once_started(servers, "stages.sft.learning_rate=4e-4")
    unchanged = demo()
    assert unchanged["prefect_flow_run"] != other
    asked = httpx.get(f"{servers['resources']['prefect_page']}/api/flow_runs/{other}").json()
    assert asked["state"]["type"] == "CANCELLED"
