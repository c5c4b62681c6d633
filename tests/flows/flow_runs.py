"""Flow runs on the servers of a test: started, watched, cancelled and killed as by a person."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from tests.test_local import alive, states
from vila_ops import local
from vila_ops.artifacts.leases import hold
from vila_ops.config import load
from vila_ops.config.local import LocalServers
from vila_ops.pipeline.stages import inputs_of
from vila_ops.train.job import StageInputs
from vila_ops.train.stage import address_of

ROOT = Path(__file__).parents[2]
STAGES = ("pretrain", "sft")
"""Each takes a controller, two workers and an evaluator, which all import torch."""
Json = dict[str, Any]


def written(folder: Path, settings: LocalServers) -> Json:
    """What a test knows of its servers, with the files of a recipe and of resources that use them."""
    at = local.endpoints(settings)
    resources = {
        "launch": "ray",
        "ray_address": at.ray,
        "storage": {"store": str(folder / "store"), "cache": str(folder / "cache")},
        "tracking": {"uri": at.mlflow},
        "train": {"num_workers": 2, "zero_stage": 2},
        "serve": {"port": settings.serve_port},
    }
    recipe = yaml.safe_load((ROOT / "configs/recipes/tiny.yaml").read_text())
    recipe["extends"] = [str(ROOT / "configs/services/default.yaml")]
    recipe["stages"] = {name: recipe["stages"][name] for name in STAGES}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "resources.yaml").write_text(yaml.safe_dump(resources))
    (folder / "local.yaml").write_text(yaml.safe_dump(settings.model_dump()))
    return {"folder": folder, "settings": settings, "at": at, "resources": resources}


@contextlib.contextmanager
def waiting_flow_run(servers: Json, *, seed: int, launch: str = "inline") -> Iterator[str]:
    """A flow run in its process, which waits for this test's lease of the stage `sft`; yields its id."""
    parameters, inputs = _evaluation(servers, seed=seed, launch=launch)
    with hold(address_of(inputs), store=inputs.resources.storage.store):
        flow_run = start_flow_run(servers, "vila-evaluate/suite", parameters)
        until(lambda: f"/{address_of(inputs).key}: locked by PID" in worker_log(servers))
        yield flow_run


@dataclass(frozen=True)
class PacedFlowRun:
    """A flow run in its process, which trains a step of the stage `sft` whenever its test says so."""

    name: str
    """Its id."""
    inputs: StageInputs
    steps: Path

    @classmethod
    def start(cls, servers: Json, *, seed: int) -> "PacedFlowRun":
        """Start it by a deployment of its own, which is a copy of `vila-evaluate/suite`."""
        parameters, inputs = _evaluation(servers, seed=seed, launch="inline")
        steps = servers["folder"] / f"steps-{seed}"
        steps.mkdir()
        there = ask(servers, "GET", "/deployments/name/vila-evaluate/suite")
        kept = ("flow_id", "pull_steps", "tags", "work_pool_name", "work_queue_name", "parameter_openapi_schema")
        entrypoint = f"{ROOT}/tests/flows/paced_evaluation.py:evaluate"
        own = {"name": "paced", "entrypoint": entrypoint, "job_variables": {"env": {"VILA_STEPS": str(steps)}}}
        ask(servers, "POST", "/deployments/", {**{key: there[key] for key in kept}, **own})
        return cls(start_flow_run(servers, "vila-evaluate/paced", parameters), inputs, steps)

    def step(self, number: int) -> None:
        """Let it do a step, counted from 0; returns when the step has begun."""
        file = self.steps / str(number)
        file.touch()
        until(lambda: not file.exists())


def _evaluation(servers: Json, *, seed: int, launch: str) -> tuple[Json, StageInputs]:
    """Parameters of the flow `vila-evaluate` for a stage `sft` of its own, and what this stage is trained from."""
    folder, kept = servers["folder"], ("storage", "tracking", *(("ray_address",) if launch == "ray_job" else ()))
    resources = {key: value for key, value in servers["resources"].items() if key in kept} | {"launch": launch}
    if launch == "ray_job":
        resources["job_address"] = servers["at"].ray_dashboard
    (folder / f"{launch}.yaml").write_text(yaml.safe_dump(resources))
    overrides = (f"stages.sft.seed={seed}",)
    run = load(folder / "recipe.yaml", resources=folder / f"{launch}.yaml", overrides=overrides)
    own = run.with_changes({"resources.launch": "inline", "resources.ray_address": None, "resources.job_address": None})
    data, init = inputs_of(own, "sft")
    inputs = StageInputs(
        stage=run.recipe.stages["sft"], model=run.recipe.model, data=data, init=init, resources=run.resources
    )
    parameters = {"recipe": f"{folder}/recipe.yaml", "resources": f"{folder}/{launch}.yaml", "overrides": overrides}
    return {**parameters, "suite": "stage"}, inputs


def start_flow_run(servers: Json, deployment: str, parameters: Json, *, state: Json | None = None) -> str:
    """A run of a deployment, which is due at once unless its state says otherwise; returns its id."""
    there = ask(servers, "GET", f"/deployments/name/{deployment}")
    body = {"parameters": parameters, "state": state or {"type": "SCHEDULED"}}
    return str(ask(servers, "POST", f"/deployments/{there['id']}/create_flow_run", body)["id"])


def ask(servers: Json, method: str, path: str, body: Any = None) -> Any:
    """What Prefect's API answers; it is asked again while its sqlite is locked, as on a busy machine."""
    url = f"{servers['at'].prefect}/api{path}"
    while (said := httpx.request(method, url, json=body, trust_env=False, timeout=60)).status_code == 503:
        time.sleep(0.2)
    return said.raise_for_status().json() if said.content else None


def artifacts_of(servers: Json, flow_run: str) -> Json:
    """What a flow run shows on its page, by key; tables as their rows."""
    asked = ask(servers, "POST", "/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [flow_run]}}})
    return {one["key"]: json.loads(one["data"]) if one["type"] == "table" else one["data"] for one in asked}


def worker_log(servers: Json) -> str:
    return (Path(servers["settings"].root) / "logs/worker.log").read_text(errors="replace")


def state_of(servers: Json, flow_run: str) -> str:
    asked = httpx.get(f"{servers['at'].prefect}/api/flow_runs/{flow_run}", trust_env=False, timeout=30)
    return str(asked.raise_for_status().json()["state"]["type"])


def until(true: Callable[[], bool], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def processes_of(flow_run: str) -> list[psutil.Process]:
    """The processes that run a flow run, by their environment."""
    own = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("PREFECT__FLOW_RUN_ID") == flow_run and alive(process.pid):
                own.append(process)
    return own


def kill_server(servers: Json, name: str) -> None:
    """SIGKILL to a server, in such an order that nothing starts it again. What it started in other sessions lives."""
    record = json.loads((Path(servers["settings"].root) / f"pids/{name}.json").read_text())
    own = [process for process in psutil.process_iter() if _session_of(process) == record["pid"]]
    for process in sorted(own, key=lambda one: one.pid != record["pid"]):
        with contextlib.suppress(psutil.NoSuchProcess):  # some end by themselves with the first
            process.kill()


def _session_of(process: psutil.Process) -> int | None:
    with contextlib.suppress(ProcessLookupError):
        return os.getsid(process.pid)
    return None


def up_again(servers: Json) -> None:
    with contextlib.chdir(ROOT):
        local.up(servers["settings"])


def cancel(servers: Json, flow_run: str) -> None:
    """As Prefect's UI does."""
    url = f"{servers['at'].prefect}/api/flow_runs/{flow_run}/set_state"
    httpx.post(url, json={"state": {"type": "CANCELLING"}}, trust_env=False).raise_for_status()


def automations(servers: Json) -> list[str]:
    asked = httpx.post(f"{servers['at'].prefect}/api/automations/filter", json={}, trust_env=False).json()
    return sorted(one["name"] for one in asked)


def pids(settings: LocalServers) -> dict[str, int | None]:
    return {server.name: server.pid for server in local.status(settings)}


def await_healthy(settings: LocalServers) -> None:
    """Wait until every server answers `status`, which gives it a few seconds each time."""
    deadline = time.monotonic() + 600
    while states(settings) != {"healthy"}:
        assert time.monotonic() < deadline
        time.sleep(1)
