"""The servers themselves: where they store, what they keep secret, and how they are adopted, replaced, backed up, ended
and restored.
"""

import contextlib
import json
import os
import shutil
import signal
import sqlite3
from pathlib import Path

import httpx
import psutil
import pytest
from typer.testing import CliRunner

from tests.flows.demo_command import CANARY, command_lines, environment
from tests.flows.flow_runs import ROOT, Json, await_healthy, pids
from tests.test_local import alive, content, files_below, states
from vila_ops import local
from vila_ops.cli import app
from vila_ops.config import load
from vila_ops.config.local import LocalServers
from vila_ops.local.servers import ray_folder
from vila_ops.pipeline.explain import explain
from vila_ops.registry import alias_register

pytestmark = [pytest.mark.ray, pytest.mark.slow]


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
