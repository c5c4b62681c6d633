"""An unchanged pipeline run again: seconds from RUNNING to COMPLETED, as Prefect recorded them. Target: at most 10 s.

Peer: a Prefect flow with as many empty tasks as ours has tasks, each found in Prefect's own result cache. Ours
looks up every task in the store, queries the registry and the replica, sends the served model one question and
writes the report; that is what it may cost beyond the peer.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import httpx
from result import result

from vila_ops import local
from vila_ops.config import Run, load
from vila_ops.config.local import LocalServers

ROUNDS = 3
TARGET_SECONDS = 10.0
TASKS = 14
PEER = f"""
from prefect import flow, task
from prefect.cache_policies import INPUTS

@task(cache_policy=INPUTS, persist_result=True)
def nothing(number: int, before: str | None) -> str:
    return f"digest {{number}}"

@flow(name="peer")
def peer() -> None:
    last = None
    for number in range({TASKS}):
        last = nothing(number, last)

peer()
"""


def main() -> None:
    root = Path(__file__).parents[1]
    os.chdir(root)
    with tempfile.TemporaryDirectory() as folder:
        settings = _servers(Path(folder))
        run = _tiny(Path(folder), settings)
        env = {**os.environ, **local.env(settings)}
        (Path(folder) / "peer.py").write_text(PEER)
        prefect = str(Path(sys.executable).parent / "prefect")
        parameters = json.dumps({"run": run.model_dump(mode="json")})
        deployed = [prefect, "deployment", "run", "vila/full-pipeline", "--params", parameters, "--watch"]
        peer = [sys.executable, str(Path(folder) / "peer.py")]
        try:
            local.up(settings)
            seconds = _seconds(f"{local.endpoints(settings).prefect}/api")
            for command in (deployed, peer):  # the first run makes everything; later runs are timed
                subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            times: dict[str, list[float]] = {"ours": [], "peer": []}
            for _ in range(ROUNDS):
                for name, command in (("ours", deployed), ("peer", peer)):
                    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                    times[name].append(seconds())
        finally:
            local.down(settings)
    ours, theirs = (statistics.median(times[name]) for name in ("ours", "peer"))
    ok = ours <= TARGET_SECONDS
    result("unchanged_flow", ours=ours, peer=theirs, target=TARGET_SECONDS, ok=ok, unit="s", times=times)


def _servers(folder: Path) -> LocalServers:
    names = [name for name in LocalServers.model_fields if name.endswith("_port")]
    ports = {name: 25_000 + number for number, name in enumerate(names)}
    return LocalServers.model_validate({"root": str(folder / "local"), "ray_object_store_bytes": 100 * 2**20, **ports})


def _tiny(folder: Path, settings: LocalServers) -> Run:
    """The tiny recipe through Ray, DeepSpeed, MLflow and Serve."""
    at = local.endpoints(settings)
    chosen = {
        "ray_address": at.ray,
        "tracking.uri": at.mlflow,
        "serve.port": settings.serve_port,
        **{f"storage.{name}": str(folder / name) for name in ("store", "cache", "data")},
    }
    return load(
        Path("configs/recipes/tiny.yaml"),
        resources=Path("configs/resources/laptop.yaml"),
        overrides=tuple(f"resources.{name}={value}" for name, value in chosen.items()),
    )


def _seconds(api: str) -> Callable[[], float]:
    """The run time of the newest flow run. Raises if it has not completed."""

    def newest() -> float:
        body = {"sort": "START_TIME_DESC", "limit": 1}
        (run,) = httpx.post(f"{api}/flow_runs/filter", json=body, trust_env=False).raise_for_status().json()
        if run["state"]["type"] != "COMPLETED":
            raise RuntimeError(f"flow run {run['name']} is {run['state']['name']}: {run['state'].get('message')}")
        return float(run["total_run_time"])

    return newest


if __name__ == "__main__":
    main()
