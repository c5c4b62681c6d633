"""Our automations of Prefect: what it does where the sweeper, a flow or a state of a flow run asks for it.

People are notified by the notification blocks named BLOCK, of whatever type, if Prefect has one.
"""

from typing import Any

import httpx

from vila_ops.config.base import fingerprint
from vila_ops.local.servers import AUTOMATION

LOST, CANCELLED = "vila.attempt.lost", "vila.attempt.cancelled"
"""Events of the sweeper: a flow run's process has ended or was never started; the second one, of a run that was to be
cancelled."""
PROMOTED = "vila.model.promoted"
"""Event of a flow: a model has become the champion. It is about the resource `vila.model.NAME`."""
BLOCK = "vila-ops"
"""Name of the notification block."""
TAG = "vila"
"""Tag of our deployments."""
Json = dict[str, Any]


def automations(blocks: list[str]) -> list[Json]:
    """Our automations, as Prefect's API takes them; those that notify only with the ids of notification blocks."""
    crashed = "Its process ended without a word, or was never started. Run it again: what was finished is kept."
    stopped = "It was cancelled, and its process has ended. Run it again: what was finished is kept."
    own = [
        _automation(AUTOMATION, _on(LOST), [_state("CRASHED", crashed)]),
        _automation("vila-ops: cancelled flow runs have ended", _on(CANCELLED), [_state("CANCELLED", stopped)]),
    ]
    if blocks:
        failed = _on("prefect.flow-run.Failed", "prefect.flow-run.Crashed")
        ours = {"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{TAG}"}
        run = "{{ flow.name }}/{{ flow_run.name }}"
        told = f"{run} is {{{{ flow_run.state.name }}}}", "{{ flow_run.state.message }}\n{{ flow_run|ui_url }}"
        won = "{{ event.resource.name }} is the champion", f"{{{{ event.payload.reason }}}}\nBy the flow run {run}"
        own += [
            _automation("vila-ops: notify of failures", {**failed, "match_related": ours}, _notify(blocks, *told)),
            _automation("vila-ops: notify of promotions", _on(PROMOTED, about="vila.model.*"), _notify(blocks, *won)),
        ]
    return own


def _on(*events: str, about: str = "prefect.flow-run.*") -> Json:
    return {
        "type": "event",
        "posture": "Reactive",
        "expect": [*events],
        "match": {"prefect.resource.id": about},
        "for_each": ["prefect.resource.id"],
        "threshold": 1,
        "within": 0,
    }


def _state(state: str, message: str) -> Json:
    """Set the state of the flow run that an event is about."""
    return {"type": "change-flow-run-state", "state": state, "message": message}


def _notify(blocks: list[str], subject: str, body: str) -> list[Json]:
    return [
        {"type": "send-notification", "block_document_id": block, "subject": subject, "body": body} for block in blocks
    ]


def _automation(name: str, trigger: Json, actions: list[Json]) -> Json:
    """An automation with a description that tells whether Prefect has this version of it."""
    own = {"name": name, "trigger": trigger, "actions": actions}
    return {**own, "description": f"Made by vila-ops, see docs/operations.md ({fingerprint(own)[:12]})"}


def reconcile(api: httpx.Client) -> None:
    """Make Prefect's automations of our names ours; one that is there already is left alone.

    A person may switch one off: that stays. Raises httpx.HTTPError.
    """
    named = {"name": {"any_": [BLOCK]}}
    wanted_blocks = {"block_documents": named, "block_schemas": {"block_capabilities": {"all_": ["notify"]}}}
    wanted = automations(sorted(block["id"] for block in answer(api, "/block_documents/filter", wanted_blocks)))
    names = {"automations": {"name": {"any_": [one["name"] for one in wanted]}}}
    there: dict[str, list[Json]] = {}
    for one in answer(api, "/automations/filter", names):
        there.setdefault(one["name"], []).append(one)
    for one in wanted:
        known = there.get(one["name"], [])
        if not known:
            api.post("/automations/", json=one).raise_for_status()
        for first in known[:1]:
            if first["description"] != one["description"]:
                body = {**one, "enabled": first["enabled"]}
                api.put(f"/automations/{first['id']}", json=body).raise_for_status()
        for other in known[1:]:
            api.delete(f"/automations/{other['id']}").raise_for_status()


def answer(api: httpx.Client, url: str, body: Json | None = None) -> Any:
    """What Prefect's API answers to a GET, or to a POST of a body. Raises httpx.HTTPError."""
    response = api.get(url) if body is None else api.post(url, json=body)
    return response.raise_for_status().json()
