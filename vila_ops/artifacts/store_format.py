"""The format of a store: that of its sealed manifests, leases and registers. A store tells it in STORE/format.json."""

import json
from contextlib import suppress

from vila_ops import __version__
from vila_ops.artifacts.backend import Backend
from vila_ops.config import fingerprint
from vila_ops.errors import CorruptArtifact, OtherFormat

FORMAT = 1
NAME = "format.json"
KNOWN: set[str] = set()
"""The stores that this process has looked at."""


def check_format(backend: Backend, root: str) -> None:
    """Mark a store with the format that this version writes, if it has no mark; once per process.

    Stores from before the mark have format 1. Raises OtherFormat for another one, CorruptArtifact for a damaged mark.
    """
    if root in KNOWN:
        return
    place = f"{root}/{NAME}"
    if not backend.create(place, mark(FORMAT)) and (there := backend.read(place)) != mark(FORMAT):
        refuse_other(root, _format_of(place, there), reads=FORMAT)
    KNOWN.add(root)


def refuse_marked(backend: Backend, root: str) -> None:
    """Raise OtherFormat where the mark of a store says another format; one that is absent or damaged says none."""
    place = f"{root}/{NAME}"
    there = backend.read(place)
    with suppress(CorruptArtifact):
        refuse_other(root, _format_of(place, there), reads=FORMAT)


def mark(written: int) -> bytes:
    """The content of the file that says a format."""
    body = {"format": written}
    return json.dumps({**body, "checksum": fingerprint(body)}).encode()


def refuse_other(place: str, written: object, *, reads: int) -> None:
    """Raise OtherFormat for a format that this version does not read."""
    if written != reads:
        raise OtherFormat(
            f"{place} has format {written}, and vila-ops {__version__} reads {reads}; nothing was changed; use the "
            f"version of vila-ops that wrote it, or a later one whose CHANGELOG says how it takes over this format"
        )


def _format_of(place: str, data: bytes | None) -> int:
    """The format that a mark says. Raises CorruptArtifact."""
    try:
        written = int(json.loads(data or b"")["format"])
        if data != mark(written):
            raise ValueError("its checksum is another one")
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptArtifact(
            f"{place} does not say the format of the store ({error}); restore it from a backup, or if all of the store "
            f"is of vila-ops {__version__} or before, move {place} away and run again to write it"
        ) from error
    return written
