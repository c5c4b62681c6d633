"""Flow runs whose processes were killed, told to Prefect, which marks them as crashed.

Prefect notices the end of a process only while the worker that started it lives. A flow run holds a lease of the store
(`flow_run/ID`), whose place it writes into its labels. The sweeper reads the leases of all flow runs that Prefect calls
running. Where a process has ended, or has stored no heartbeat for long, it emits an event about the flow run. Our
automations react to these events alone. Prefect's own recipe reacts to missing heartbeats of Prefect, so an outage of
its server crashes healthy runs; here an outage delays the sweep.

A worker that is killed between its claim of a flow run and the start of a process leaves a run without a lease, which
no worker takes again. Such a run counts as lost once it has been in one state for START_SECONDS.
"""

import base64
import logging
import os
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime

import httpx

from vila_ops.artifacts import leases
from vila_ops.artifacts.store import Address
from vila_ops.errors import VilaError
from vila_ops.pipeline.automations import CANCELLED, LOST, TAG, Json, answer, reconcile
from vila_ops.train.stage import FollowedJob, stop_job

KIND = "flow_run"
"""Kind of the leases of flow runs."""
LABEL = "vila-ops.store"
"""Label of a flow run with the store that has its lease."""
SILENT_SECONDS = 180.0
"""Time without a heartbeat, by the sweeper's clock, after which the process of another machine counts as ended."""
START_SECONDS = 1200.0
"""Time, by the sweeper's clock, within which a claimed flow run has its lease: longer than a request to Prefect is
tried again (17 minutes, see `local.servers.env`)."""
OPEN = ("PENDING", "RUNNING", "CANCELLING")
"""States in which a flow run has a process, or is about to have one."""
WORKER = "prefect.worker.type"
"""Label of a flow run with the type of the worker that claimed it."""
ATTEMPT = "vila-ops.attempt"
"""Label of a flow run with the id of the state Running in which it took its lease: a flow run that is run again has the
lease of its former attempt at first."""
JOB, JOB_SERVER = "vila-ops.job", "vila-ops.job-server"
"""Labels of a flow run with the job on a cluster that it follows; see `train.stage.FollowedJob`."""
AGAIN_SECONDS = 60.0
"""Time between two events about one flow run, if the first one had no effect."""
RECONCILE_SECONDS = 30.0
"""Time between two looks at the automations."""
ANSWER_SECONDS = 30.0
log = logging.getLogger(__name__)


def client_of(api: str) -> httpx.Client:
    """A client of Prefect's API at a URL, with the credentials that Prefect's own clients take from the environment."""
    headers = {}
    if stated := os.environ.get("PREFECT_API_AUTH_STRING"):
        headers["Authorization"] = f"Basic {base64.b64encode(stated.encode()).decode()}"
    elif key := os.environ.get("PREFECT_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    return httpx.Client(base_url=api, headers=headers, timeout=ANSWER_SECONDS)


def lease_of(flow_run: str) -> Address:
    """The address whose lease a flow run holds while it works."""
    return Address(KIND, flow_run, None, ())


class Sweeper:
    """Looks at all open flow runs of a Prefect server, again and again."""

    def __init__(
        self, api: httpx.Client, *, silent_seconds: float = SILENT_SECONDS, now: Callable[[], float] = time.monotonic
    ) -> None:
        """`api` has the URL of Prefect's API as its base."""
        self._api, self._silent_seconds, self._now = api, silent_seconds, now
        self._signs: dict[str, tuple[str, float]] = {}
        """The last sign of life of each flow run, and since when it has not changed."""
        self._told: dict[str, float] = {}
        self._reconciled = float("-inf")

    def run(self, *, every_seconds: float) -> None:
        """Sweep for ever. An outage of Prefect is waited for."""
        away = False
        while True:
            try:
                self.sweep()
                if away:
                    log.warning("Prefect at %s answers again", self._api.base_url)
                away = False
            except httpx.HTTPError as error:
                if not away:
                    log.warning("Prefect at %s does not answer: %r", self._api.base_url, error)
                away = True
            time.sleep(every_seconds)

    def sweep(self) -> list[str]:
        """Tell of each flow run whose process has ended; returns their ids. Raises httpx.HTTPError."""
        if self._now() - self._reconciled >= RECONCILE_SECONDS:
            reconcile(self._api)
            self._reconciled = self._now()
        runs = self._open()
        self._signs = {one: sign for one, sign in self._signs.items() if one in runs}
        lost = [one for one in runs.values() if self._is_lost(one)]
        return [one["id"] for one in lost if self._tell(one)]

    def _open(self) -> dict[str, Json]:
        """The open flow runs that we watch, by their ids. One answer has 200 runs at most.

        Each question leaves out those of earlier answers. An offset would skip or repeat runs where one begins or ends
        between two answers.
        """
        found: dict[str, Json] = {}
        state = {"type": {"any_": [*OPEN]}}
        while page := answer(
            self._api, "/flow_runs/filter", {"flow_runs": {"state": state, "id": {"not_any_": [*found]}}}
        ):
            found |= {one["id"]: one for one in page}
        return {name: one for name, one in found.items() if _has_lease(one) or _starts(one)}

    def _is_lost(self, flow_run: Json) -> bool:
        sign: str | None
        if _has_lease(flow_run):
            try:
                sign = leases.sign_of_life(lease_of(flow_run["id"]), store=flow_run["labels"][LABEL])
            except (VilaError, OSError) as error:
                log.warning("the lease of flow run %s cannot be read: %s", flow_run["name"], error)
                self._signs.pop(flow_run["id"], None)  # what happened meanwhile is not known
                return False
            longest = self._silent_seconds
        else:
            sign, longest = flow_run["state"]["id"], START_SECONDS
        before, since = self._signs.get(flow_run["id"], (None, self._now()))
        since = since if sign == before else self._now()
        if sign is not None:
            self._signs[flow_run["id"]] = sign, since
        return sign is None or self._now() - since > longest

    def _tell(self, flow_run: Json) -> bool:
        """Emit the event about a flow run, unless that was done just now or it has another state by now."""
        name, now = flow_run["id"], self._now()
        if now - self._told.get(name, float("-inf")) < AGAIN_SECONDS:
            return False
        state = answer(self._api, f"/flow_runs/{name}")["state"]
        if state["id"] != flow_run["state"]["id"]:
            return False
        is_cancelled = state["type"] == "CANCELLING"
        event = {
            "id": str(uuid.uuid4()),
            "occurred": datetime.now(UTC).isoformat(),
            "event": CANCELLED if is_cancelled else LOST,
            "resource": {"prefect.resource.id": f"prefect.flow-run.{name}", "prefect.resource.name": flow_run["name"]},
        }
        self._api.post("/events", json=[event]).raise_for_status()
        self._told[name] = now
        log.warning("flow run %s: its process has ended; told Prefect (%s)", flow_run["name"], event["event"])
        if is_cancelled:
            _stop_job(flow_run)
        return True


def _stop_job(flow_run: Json) -> None:
    """End the job that a cancelled flow run followed, which its own process would have done."""
    labels = flow_run["labels"]
    if JOB not in labels:
        return
    job = FollowedJob(labels[JOB], labels[JOB_SERVER])
    try:
        stop_job(job)
    except (VilaError, ValueError, OSError) as error:
        log.error("the job of the cancelled flow run %s was not stopped: %s", flow_run["name"], error)


def _has_lease(flow_run: Json) -> bool:
    """Whether the present attempt at a flow run holds its lease, or held it."""
    labels, state = flow_run["labels"], flow_run["state"]
    return LABEL in labels and (
        state["type"] == "CANCELLING"
        or (state["type"] == "RUNNING" and labels.get(ATTEMPT, state["id"]) == state["id"])
    )


def _starts(flow_run: Json) -> bool:
    """Whether a run of our deployments that has no lease yet is about to get one.

    One that a cluster was given to start, such as a job of Kubernetes that waits for a place, is left to its worker.
    """
    is_left = flow_run["infrastructure_pid"] is not None and flow_run["labels"].get(WORKER) != "process"
    return TAG in flow_run["tags"] and not is_left
