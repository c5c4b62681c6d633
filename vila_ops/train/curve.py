"""The losses of a stage by step, a file of its checkpoint."""

import json
from typing import Any

from vila_ops.artifacts.kinds import Checkpoint
from vila_ops.artifacts.store import file

CURVE = "curve.json"
"""The stage's curve beside its model. Floats are in hex, so that equal text means equal bits."""


def curve_of(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The losses by step of the stage that made a model. Raises CorruptArtifact."""
    rows = json.loads(file(checkpoint, CURVE).read_text())
    return [{key: float.fromhex(v) if isinstance(v, str) else v for key, v in row.items()} for row in rows]
