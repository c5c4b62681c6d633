"""What a run says and leaves on Prefect and MLflow, what runs again after a kill, and how a corrupted shard is told."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version

import httpx
import pytest
from mlflow import MlflowClient
from openai import OpenAI

from tests.flows.demo_command import command, kill_once_started
from tests.flows.flow_runs import ROOT, STAGES, Json, artifacts_of, ask, until
from vila_ops import local

pytestmark = [pytest.mark.ray, pytest.mark.slow]


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


def test_prefects_graph_shows_which_task_reads_the_result_of_which(first: Json, servers: Json) -> None:
    wanted = {"flow_runs": {"id": {"any_": [first["prefect_flow_run"]]}}}
    until(lambda: len(ask(servers, "POST", "/task_runs/filter", wanted)) == 12)  # Prefect records them in its own time
    runs = {run["id"]: run for run in ask(servers, "POST", "/task_runs/filter", wanted)}

    def name(run: str) -> str:
        return str(runs[run]["name"]).partition("-")[0]  # of a task without a name of its own, the rest is random

    reads = {
        name(number): sorted(name(one["id"]) for given in run["task_inputs"].values() for one in given)
        for number, run in runs.items()
        if run["name"] != "evaluate on tiny_probe"  # three of them
    }
    prepared = {f"prepare tiny_{mixture}": [] for mixture in ("held_out", *STAGES)}
    assert reads == {
        "assemble": [],
        **prepared,
        "train pretrain": ["assemble", "prepare tiny_pretrain"],
        "train sft": ["prepare tiny_sft", "train pretrain"],
        "evaluate on tiny": ["prepare tiny_held_out", "train sft"],
        "register": ["evaluate on tiny", "train sft"],
        "deploy": ["register"],
    }


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
    first: Json, demo: Callable[..., Json], servers: Json
) -> None:
    changed = "final_suite.bootstrap_resamples=100"
    killed = kill_once_started(servers, changed)
    again = demo(changed)
    assert again["prefect_flow_run"] == killed
    made = {(task["task"], task["name"]) for task in again["tasks"] if task["reused"] is False}
    assert made == {("evaluate", "sft on tiny")}


def test_a_killed_demo_of_another_run_is_ended_and_an_unchanged_run_makes_nothing(
    first: Json, demo: Callable[..., Json], servers: Json
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


def test_a_corrupted_shard_is_named_and_not_tried_again(
    first: Json, told: list[str], demo: Callable[..., Json], servers: Json
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
