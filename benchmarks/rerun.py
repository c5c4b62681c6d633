"""An unchanged pipeline run again: seconds from RUNNING to COMPLETED, as Prefect recorded them.

Peer: a bare Prefect flow without tasks that makes the same calls: each request to MLflow and to the endpoint, each read
of the store and as many writes to it, recorded from one run of ours. Each of its requests has to get the status that
ours got. Target: at most 0.5 s more than the peer.
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

ROUNDS = 5
TARGET_SECONDS = 0.5
"""More than the peer."""
RECORDER = """
import base64, json, os, sys
import httpx, requests
from flows.full_pipeline import vila

recipe, resources, out, store, *services = sys.argv[1:]
calls = []

def asked(method, url, headers, body, status):
    if any(str(url).startswith(one) for one in services):
        body = base64.b64encode(body.encode() if isinstance(body, str) else body or b"").decode()
        calls.append({"method": method, "url": str(url), "headers": dict(headers), "body": body, "status": status})

def recorded(send, body_of):
    def call(self, request, **more):
        answer = send(self, request, **more)
        asked(request.method, request.url, request.headers, body_of(request), answer.status_code)
        return answer
    return call

def opened(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and os.path.abspath(arguments[0]).startswith(store):
        written = arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if written or os.path.isfile(arguments[0]):
            calls.append({"write" if written else "read": os.path.abspath(arguments[0])})

requests.Session.send = recorded(requests.Session.send, lambda request: request.body)
httpx.Client.send = recorded(httpx.Client.send, lambda request: request.content)
sys.addaudithook(opened)
vila(recipe, resources)
# what the run itself made and removed cannot be read again
gone = {call["read"] for call in calls if "read" in call and not os.path.isfile(call["read"])}
json.dump([{"write": call["read"]} if call.get("read") in gone else call for call in calls], open(out, "w"))
"""
PEER = """
import base64, json, sys, tempfile
import httpx
from prefect import flow

calls = json.load(open(sys.argv[1]))

@flow(name="peer")
def peer() -> None:
    with httpx.Client(trust_env=False, timeout=120) as client, tempfile.TemporaryDirectory() as folder:
        for number, call in enumerate(calls):
            if "read" in call:
                open(call["read"], "rb").read()
            elif "write" in call:
                open(f"{folder}/{number}", "w").write("x" * 1000)
            else:
                body = base64.b64decode(call["body"])
                answer = client.request(call["method"], call["url"], headers=call["headers"], content=body)
                if answer.status_code != call["status"]:
                    raise RuntimeError(f"{call['url']}: {answer.status_code}, where the run got {call['status']}")

peer()
"""


def main() -> None:
    root = Path(__file__).parents[1]
    os.chdir(root)
    with tempfile.TemporaryDirectory() as folder:
        settings = _servers(Path(folder))
        run, at = _tiny(Path(folder), settings), local.endpoints(settings)
        env = {**os.environ, **local.env(settings), "PYTHONPATH": str(root)}
        files = {name: Path(folder, name) for name in ("recorder.py", "peer.py", "calls.json")}
        files["recorder.py"].write_text(RECORDER)
        files["peer.py"].write_text(PEER)
        for name in ("recipe", "resources"):
            files[name] = Path(folder, f"{name}.yaml")
            files[name].write_text(json.dumps(getattr(run, name).model_dump(mode="json")))
        prefect = str(Path(sys.executable).parent / "prefect")
        given = [word for name in ("recipe", "resources") for word in ("--param", f"{name}={files[name]}")]
        deployed = [prefect, "deployment", "run", "vila/full-pipeline", *given, "--watch"]
        where = (files["calls.json"], Path(run.resources.storage.store).resolve(), at.mlflow, at.serve)
        recorded = [sys.executable, files["recorder.py"], files["recipe"], files["resources"], *where]
        peer = [sys.executable, str(files["peer.py"]), str(files["calls.json"])]
        try:
            local.up(settings)
            seconds = _seconds(f"{at.prefect}/api")
            for command in (deployed, deployed, [str(word) for word in recorded], peer):  # the first makes everything
                _call(command, env)
            times: dict[str, list[float]] = {"ours": [], "peer": []}
            for _ in range(ROUNDS):
                for name, command in (("ours", deployed), ("peer", peer)):
                    _call(command, env)
                    times[name].append(seconds())
            calls = json.loads(files["calls.json"].read_text())
        finally:
            local.down(settings)
    ours, theirs = (statistics.median(times[name]) for name in ("ours", "peer"))
    counted = {
        "mlflow": sum(str(call.get("url", "")).startswith(at.mlflow) for call in calls),
        "endpoint": sum(str(call.get("url", "")).startswith(at.serve) for call in calls),
        **{f"{kind}s": sum(kind in call for call in calls) for kind in ("read", "write")},
    }
    ok = ours - theirs <= TARGET_SECONDS
    result("rerun", ours=ours, peer=theirs, target=TARGET_SECONDS, ok=ok, unit="s", times=times, calls=counted)


def _call(command: list[str], env: dict[str, str]) -> None:
    done = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-4000:]}")


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
