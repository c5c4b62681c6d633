"""The format of a store: that of its sealed manifests, leases and registers. A store tells it in STORE/format.json."""

import json
from functools import lru_cache

from vila_ops import __version__
from vila_ops.artifacts.backend import Backend
from vila_ops.errors import CorruptArtifact, OtherFormat

FORMAT = 1
NAME = "format.json"
CONTENT = json.dumps({"format": FORMAT}).encode() + b"\n"


@lru_cache
def check_format(backend: Backend, root: str) -> None:
    """Mark a store with the format that this version writes, if it has no mark; once per process.

    Stores from before the mark have format 1. Raises OtherFormat for another one, CorruptArtifact for a damaged mark.
    """
    place = f"{root}/{NAME}"
    if backend.create(place, CONTENT):
        return
    try:
        written = int(json.loads(backend.read(place) or b"")["format"])
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptArtifact(
            f"{place} does not say the format of the store; if all of it was written by vila-ops {__version__} or "
            f"before, remove the file, and the next command writes it"
        ) from error
    refuse_other(root, written, reads=FORMAT)


def refuse_other(place: str, written: object, *, reads: int) -> None:
    """Raise OtherFormat for a format that this version does not read."""
    if written != reads:
        raise OtherFormat(
            f"{place} has format {written}, and vila-ops {__version__} reads {reads}; nothing was changed; use the "
            f"version of vila-ops that wrote it, or a later one whose CHANGELOG says how it takes over this format"
        )
