"""A trace as OpenLineage run events: a START and a COMPLETE of the task that made each artifact.

The format is the RunEvent of https://openlineage.io/spec/2-0-2/OpenLineage.json.
"""

import uuid
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

from vila_ops import __version__
from vila_ops.artifacts.store import store_of
from vila_ops.lineage.graph import Graph, Node
from vila_ops.lineage.trace import Trace

SCHEMA = "https://openlineage.io/spec/2-0-2/OpenLineage.json#/$defs/RunEvent"
PRODUCER = f"urn:vila-ops:{__version__}"
NAMESPACE = "vila-ops"
"""Of the jobs."""


def events(trace: Trace, graph: Graph) -> Iterator[dict[str, Any]]:
    """The events of every sealed artifact of a trace, in the order of their times.

    The id of a run is a function of the artifact's digest, so that the same trace gives the same events.
    """
    made = [node for node in (*trace.up, trace.asked, *trace.down) if node.uri is not None and node.sealed is not None]
    both = [event for node in made for event in _events(node, graph)]
    yield from sorted(both, key=lambda event: (event["eventTime"], event["eventType"] == "COMPLETE"))


def _events(node: Node, graph: Graph) -> Iterator[dict[str, Any]]:
    assert node.uri is not None
    assert node.sealed is not None
    root = store_of(node.uri)
    ended = datetime.fromisoformat(node.sealed)
    base = {
        "producer": PRODUCER,
        "schemaURL": SCHEMA,
        "run": {"runId": str(uuid.uuid5(uuid.NAMESPACE_URL, f"vila-ops:{node.digest}"))},
        "job": {"namespace": NAMESPACE, "name": "/".join(word for word in (node.kind, node.name) if word)},
        "inputs": [_dataset(graph.nodes[parent], root) for parent in dict.fromkeys(node.parents)],
    }
    yield {**base, "eventType": "START", "eventTime": (ended - timedelta(seconds=node.seconds)).isoformat()}
    yield {**base, "eventType": "COMPLETE", "eventTime": ended.isoformat(), "outputs": [_dataset(node, root)]}


def _dataset(node: Node, root: str) -> dict[str, str]:
    """An artifact as OpenLineage names data: the store, and a name in it."""
    return {"namespace": root if "://" in root else f"file://{root}", "name": f"{node.kind}/{node.digest}"}
