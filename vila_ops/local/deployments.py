"""Prefect's work pool and deployments on one machine."""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from vila_ops.config import Run
from vila_ops.config.base import fingerprint
from vila_ops.config.grid import Grid
from vila_ops.config.local import LocalServers
from vila_ops.config.named import shipped
from vila_ops.config.retrain import RetrainPolicy
from vila_ops.config.schedule import Schedule
from vila_ops.errors import ServerFailed
from vila_ops.local.servers import QUICK_SECONDS, answers, endpoints, env, get_json, login

RETRAIN_QUEUE = "retrain"
"""Work queue of the flow runs that retrain."""
BUSY_TRIES, BUSY_SECONDS = 30, 1.0
"""How often a change is tried, and the pause between two tries: Prefect refuses it while its sqlite is locked."""
Json = dict[str, Any]
log = logging.getLogger(__name__)


def make_work_pool(settings: LocalServers) -> None:
    """Create the work pool and its queue for retraining, where they do not exist. The worker completes the pool."""
    pools = f"{endpoints(settings).prefect}/api/work_pools"
    own = login(settings)
    if not answers(f"{pools}/{settings.work_pool}", QUICK_SECONDS, **own):
        pool = {"name": settings.work_pool, "type": "process"}
        get_json(f"{pools}/", settings.start_timeout_seconds, json=pool, **own)
    queues = f"{pools}/{settings.work_pool}/queues"
    if not answers(f"{queues}/{RETRAIN_QUEUE}", QUICK_SECONDS, **own):
        # one run at a time: another would wait for the lease, in a place of the worker that other flows could have
        queue = {"name": RETRAIN_QUEUE, "concurrency_limit": 1}
        get_json(queues, settings.start_timeout_seconds, json=queue, **own)


def deploy_flows(settings: LocalServers) -> None:
    """Make Prefect's deployments those of `prefect_file`, with the current parameters of their flows.

    Without such a file of their own, people change schedules in Prefect's UI, and find them again. Raises ServerFailed
    where Prefect refuses a change, or does not end in time.
    """
    file = file_of(settings)
    wanted = yaml.safe_load(file.read_text())["deployments"]
    digest = _flows_digest(file, wanted)
    url = f"{endpoints(settings).prefect}/api/deployments/filter"
    before: list[Json] = get_json(url, settings.start_timeout_seconds, json={}, **login(settings)) or []
    live = {one["name"]: one["version"] for one in before}
    if all(live.get(deployment["name"]) == digest for deployment in wanted):
        return
    began = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file)],
            env={**os.environ, **env(settings), "PWD": str(Path.cwd()), "VILA_OPS_FLOWS": digest},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=settings.start_timeout_seconds,
        )
    except subprocess.TimeoutExpired as error:
        raise ServerFailed(
            f"prefect deploy of {file} did not end within {error.timeout:.0f} s; where the machine is busy, run "
            f"the same command again, or raise start_timeout_seconds in the file of --servers"
        ) from error
    if done.returncode:
        raise ServerFailed(f"prefect deploy of {file} failed:\n{done.stdout[-4000:]}")
    if settings.prefect_file is None:
        names = {deployment["name"] for deployment in wanted}
        for deployment in before:
            if deployment["name"] in names:
                _put_back(settings, deployment)
    log.info("deployments: deployed from %s in %.1f s", file, time.monotonic() - began)


def _put_back(settings: LocalServers, before: Json) -> None:
    """Change the schedules of a deployment to what they were before Prefect set them to what the file says."""
    import httpx  # heavy

    url = f"{endpoints(settings).prefect}/api/deployments/{before['id']}"
    with httpx.Client(timeout=settings.start_timeout_seconds, trust_env=False, **login(settings)) as client:
        for tries_left in reversed(range(BUSY_TRIES)):
            try:
                there = client.get(url).raise_for_status().json()["schedules"]
                for changed, schedule in schedules_changed(before["schedules"], there):
                    if changed is None:
                        client.post(f"{url}/schedules", json=[schedule]).raise_for_status()
                    else:
                        client.patch(f"{url}/schedules/{changed}", json=schedule).raise_for_status()
                return
            except httpx.HTTPError as error:
                if not tries_left:
                    raise ServerFailed(
                        f"the schedules of the deployment {before['name']!r} are those of our file now, and were not "
                        f"put back ({error!r}); see {endpoints(settings).prefect}/deployments and set them there"
                    ) from error
                time.sleep(BUSY_SECONDS)


def schedules_changed(before: Sequence[Json], after: Sequence[Json]) -> Iterator[tuple[str | None, Json]]:
    """The schedules to change, by their ids, and those to make (None), so that those from before are there. Pure.

    A schedule is known again by its times.
    """
    for one in before:
        wanted = {key: one[key] for key in ("schedule", "active", "parameters")}
        twin = next((other for other in after if other["schedule"] == one["schedule"]), None)
        if twin is None:
            yield None, wanted
        elif any(twin[key] != value for key, value in wanted.items()):
            yield twin["id"], wanted


def check_work_pools(settings: LocalServers) -> str:
    """The work pools that the deployments of `prefect_file` name.

    Raises ValueError where Prefect has no such pool: no worker would ever take their flow runs. Raises ServerFailed
    where Prefect does not answer.
    """
    file, prefect = file_of(settings), endpoints(settings).prefect
    named = [(one.get("work_pool") or {}).get("name") for one in yaml.safe_load(file.read_text())["deployments"]]
    wanted = {name for name in named if name and "{{" not in name}  # others are the default's, or filled in later
    there: list[Json] | None = get_json(f"{prefect}/api/work_pools/filter", QUICK_SECONDS, json={}, **login(settings))
    if there is None:
        raise ServerFailed(f"{prefect} did not say which work pools it has; see `vila-ops logs prefect`, and try again")
    if missing := sorted(wanted - {one["name"] for one in there}):
        raise ValueError(
            f"deployments of {file} name the work pool {missing[0]!r}, which Prefect does not have, so that their flow "
            f"runs would wait for ever; correct the name, or create it: `prefect work-pool create {missing[0]}`"
        )
    return f"work pools of {file}: {', '.join(sorted(wanted))}"


def file_of(settings: LocalServers) -> Path:
    """The file of the deployments. Raises ValueError for one that does not exist."""
    if settings.prefect_file is None:
        return shipped("infra/prefect.yaml").absolute()
    file = Path(settings.prefect_file).expanduser().absolute()
    if not file.is_file():
        raise ValueError(f"no such file: {file}; set prefect_file in configs/local.yaml to one, or to null for ours")
    return file


def _flows_digest(file: Path, deployments: list[dict[str, Any]]) -> str:
    """Digest of the file, of the Python files beside the flows, and of the schemas of their parameters."""
    folders = {_folder_of(deployment["entrypoint"]) for deployment in deployments}
    sources = sorted(source for folder in folders for source in folder.glob("*.py"))
    schemas = [kind.model_json_schema() for kind in (Run, Grid, RetrainPolicy, Schedule)]
    return fingerprint([str(Path.cwd()), file.read_text(), schemas, *(source.read_text() for source in sources)])[:16]


def _folder_of(entrypoint: str) -> Path:
    """The folder of a flow that is named as folder/file.py:flow or package.module.flow.

    Raises ValueError for a module that is not installed.
    """
    path, colon, _ = entrypoint.rpartition(":")
    if colon:
        return Path(path).parent
    module = entrypoint.rpartition(".")[0]
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:  # of the package around it
        spec = None
    if spec is None or spec.origin is None:
        raise ValueError(f"entrypoint {entrypoint}: there is no module {module}; install it beside vila-ops")
    return Path(spec.origin).parent
