"""The demo: servers up, the flow `vila` through its deployment, progress on the terminal, addresses at the end.

It talks to Prefect over HTTP, as any client would, and so does not import it.
"""

import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from vila_ops import local
from vila_ops.artifacts import output
from vila_ops.config import Run
from vila_ops.config.local import LocalServers
from vila_ops.report.summary import BEGINS
from vila_ops.serve.sample_query import curl

DEPLOYMENT = "vila/full-pipeline"
TAG = "vila-ops-demo"
"""Prefect tag of every flow run that a demo started."""
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
POLL_SECONDS = 1.0
BUSY_TRIES = 30
OUR_LOG_LINE = re.compile(r"vila_ops[\w.]*:? (?:- )?(.*)$")
Json = dict[str, Any]
Say = Callable[[str], None]


def demo(run: Run, settings: LocalServers, *, say: Say) -> None:
    """Run a recipe from servers to a served model. Raises RuntimeError with the log's place when the flow fails."""
    started = time.monotonic()
    say("starting MLflow, Prefect, its worker and Ray ...")
    os.environ |= local.env(settings)
    endpoints = local.up(settings)
    say(f"servers are up after {time.monotonic() - started:.0f} s; this machine's pages:")
    say(f"  MLflow  {endpoints.mlflow}\n  Prefect {endpoints.prefect}")
    log = Path(settings.root) / "logs" / "worker.log"
    lines = local.lines_of(log, last=0)
    next(lines)
    try:
        with httpx.Client(base_url=f"{endpoints.prefect}/api", timeout=30, **local.login(settings)) as api:
            flow_run = _adopt(api, run, settings, say) or _start(api, run)
            say(f"flow run {flow_run['name']}: {endpoints.prefect}/runs/flow-run/{flow_run['id']}")
            for state in _states(api, flow_run["id"], settings):
                last = state
                _say_new(lines, say, started)
    except httpx.HTTPError as error:
        raise RuntimeError(
            f"Prefect at {endpoints.prefect}: {error!r}; see {log.with_name('prefect.log')}, and run the demo "
            f"again: finished tasks are kept"
        ) from error
    if last["type"] != "COMPLETED":
        raise RuntimeError(f"flow run {flow_run['name']} is {last['name']}: {last.get('message')}; see {log}")
    _say_results(run, endpoints, say, seconds=time.monotonic() - started)


def _start(api: httpx.Client, run: Run) -> Json:
    deployment: Json = _request(api, "GET", f"/deployments/name/{DEPLOYMENT}")
    body = {"parameters": _parameters(run), "idempotency_key": secrets.token_hex(8), "tags": [TAG]}
    started: Json = _request(api, "POST", f"/deployments/{deployment['id']}/create_flow_run", json=body)
    return started


def _adopt(api: httpx.Client, run: Run, settings: LocalServers, say: Say) -> Json | None:
    """The live flow run of a demo that was killed, if its parameters are the same; any other is ended."""
    wanted = {"tags": {"all_": [TAG]}, "state": {"type": {"any_": ["SCHEDULED", "PENDING", "RUNNING"]}}}
    adopted = None
    for flow_run in _request(api, "POST", "/flow_runs/filter", json={"flow_runs": wanted}):
        works = flow_run["infrastructure_pid"] is None or local.owns(settings, _pid(flow_run))
        if works and adopted is None and flow_run["parameters"] == _parameters(run):
            adopted = flow_run
            say(f"resuming flow run {flow_run['name']}, which an earlier demo started")
        else:
            _end(api, flow_run, settings, works=works)
            say(f"ended flow run {flow_run['name']}, which an earlier demo started")
    return adopted


def _end(api: httpx.Client, flow_run: Json, settings: LocalServers, *, works: bool) -> None:
    """Let the worker end a flow run; one whose process is gone is marked as crashed."""
    state = {"type": "CANCELLING" if works else "CRASHED", "message": "ended by a later demo"}
    _request(api, "POST", f"/flow_runs/{flow_run['id']}/set_state", json={"state": state, "force": True})
    for _ in _states(api, flow_run["id"], settings):
        pass


def _pid(flow_run: Json) -> int:
    """The process id that Prefect recorded for a flow run, as host:pid."""
    return int(flow_run["infrastructure_pid"].rpartition(":")[2])


def _parameters(run: Run) -> Json:
    return {"recipe": run.recipe.model_dump(mode="json"), "resources": run.resources.model_dump(mode="json")}


def _request(api: httpx.Client, method: str, url: str, **request: Any) -> Any:
    """Prefect's answer as JSON; repeats the request while Prefect's SQLite is locked (503), and a question that a busy
    server answers too late."""
    for tries_left in reversed(range(BUSY_TRIES)):
        try:
            response = api.request(method, url, **request)
        except httpx.ReadTimeout:
            if method != "GET" or not tries_left:
                raise
            continue
        if response.status_code != httpx.codes.SERVICE_UNAVAILABLE:
            break
        time.sleep(POLL_SECONDS)
    return response.raise_for_status().json()


def _states(api: httpx.Client, flow_run: str, settings: LocalServers) -> Iterator[Json]:
    """Poll the state of a flow run until it ends. Raises RuntimeError when no worker runs it."""
    while True:
        works = local.runs(settings, "worker")  # read before the state: the worker may end right after Prefect answers
        state: Json = _request(api, "GET", f"/flow_runs/{flow_run}")["state"]
        yield state
        if state["type"] in ENDED:
            return
        if not works:
            raise RuntimeError(
                f"Prefect's worker has ended, and with it the flow run; see {settings.root}/logs/worker.log, "
                f"and run the demo again: finished tasks are kept"
            )
        time.sleep(POLL_SECONDS)


def _say_new(lines: Iterator[str | None], say: Say, started: float) -> None:
    """Print what our tasks have logged since the last call."""
    for line in iter(lines.__next__, None):
        if match := OUR_LOG_LINE.search(line):
            elapsed = round(time.monotonic() - started)
            say(f"{elapsed // 60:3d}:{elapsed % 60:02d}  {match.group(1)}")


def _say_results(run: Run, endpoints: local.Endpoints, say: Say, *, seconds: float) -> None:
    folder = run.resources.storage.scratch() / run.recipe.name
    summary = json.loads((folder / "summary.json").read_text())
    summary["seconds_with_servers"] = round(seconds, 1)
    output.write_file(folder / "summary.json", json.dumps(summary, indent=1), begins=BEGINS["summary.json"])
    answer = summary["answer"]
    say(f"\ndone in {seconds / 60:.1f} minutes")
    if answer is None:
        say(f"the gate refused the model and there is no champion to serve; see {endpoints.mlflow}")
        return
    say(f"asked {answer['question']!r} about a held-out image of {answer['truth']!r}; answer: {answer['reply']!r}, "
        f"streamed in {answer['tokens']} tokens")  # fmt: skip
    say(f"  report    {folder / 'report.html'}")
    say(f"  summary   {folder / 'summary.json'}")
    say(f"  MLflow    {summary['mlflow']['runs']}")
    say(f"  Prefect   {endpoints.prefect}")
    say(f"  chat      {answer['url']}/")
    say(f"  endpoint  {answer['url']}/v1/chat/completions")
    say(f"  try       {curl(answer['url'], '@' + str(folder / 'ask.json'))}")
    say("the servers stay up; `vila-ops down` ends them")
