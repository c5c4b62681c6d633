"""Flow runs whose processes were killed, told to Prefect, which marks them as crashed.

Prefect notices the end of a process only while the worker that started it lives. A flow run holds a lease of the store
(`flow_run/ID`), whose place it writes into its labels. The sweeper reads the leases of all flow runs that Prefect calls
running. Where a process has ended, or has stored no heartbeat for long, it emits an event about the flow run. Our
automations react to these events alone. Prefect's own recipe reacts to missing heartbeats of Prefect, so an outage of
its server crashes healthy runs; here an outage delays the sweep.
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
from vila_ops.pipeline.automations import CANCELLED, LOST, Json, answer, reconcile

KIND = "flow_run"
"""Kind of the leases of flow runs."""
LABEL = "vila-ops.store"
"""Label of a flow run with the store that has its lease."""
SILENT_SECONDS = 180.0
"""Time without a heartbeat, by the sweeper's clock, after which the process of another machine counts as ended."""
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
    """Looks at all running flow runs of a Prefect server, again and again."""

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
        running = self._running()
        self._signs = {one: sign for one, sign in self._signs.items() if one in running}
        lost = [one for one in running.values() if LABEL in one["labels"] and self._is_lost(one)]
        return [one["id"] for one in lost if self._tell(one)]

    def _running(self) -> dict[str, Json]:
        """The flow runs that Prefect calls running, by their ids. One answer has 200 of them at most.

        Each question leaves out those of earlier answers. An offset would skip or repeat runs where one begins or ends
        between two answers.
        """
        running: dict[str, Json] = {}
        known: list[str] = []
        wanted = {"state": {"type": {"any_": ["RUNNING", "CANCELLING"]}}, "id": {"not_any_": known}}
        while page := answer(self._api, "/flow_runs/filter", {"flow_runs": wanted}):
            running |= {one["id"]: one for one in page}
            known[:] = running
        return running

    def _is_lost(self, flow_run: Json) -> bool:
        try:
            sign = leases.sign_of_life(lease_of(flow_run["id"]), store=flow_run["labels"][LABEL])
        except (VilaError, OSError) as error:
            log.warning("the lease of flow run %s cannot be read: %s", flow_run["name"], error)
            self._signs.pop(flow_run["id"], None)  # what happened meanwhile is not known
            return False
        before, since = self._signs.get(flow_run["id"], (None, self._now()))
        since = since if sign == before else self._now()
        if sign is not None:
            self._signs[flow_run["id"]] = sign, since
        return sign is None or self._now() - since > self._silent_seconds

    def _tell(self, flow_run: Json) -> bool:
        """Emit the event about a flow run, unless that was done just now or the flow run has ended meanwhile."""
        name, now = flow_run["id"], self._now()
        if now - self._told.get(name, float("-inf")) < AGAIN_SECONDS:
            return False
        state = answer(self._api, f"/flow_runs/{name}")["state"]["type"]
        if state not in ("RUNNING", "CANCELLING"):
            return False
        event = {
            "id": str(uuid.uuid4()),
            "occurred": datetime.now(UTC).isoformat(),
            "event": LOST if state == "RUNNING" else CANCELLED,
            "resource": {"prefect.resource.id": f"prefect.flow-run.{name}", "prefect.resource.name": flow_run["name"]},
        }
        self._api.post("/events", json=[event]).raise_for_status()
        self._told[name] = now
        log.warning("flow run %s: its process has ended; told Prefect (%s)", flow_run["name"], event["event"])
        return True
