"""Resume checkpoints in a store: which stage each folder is of, how far it came, and whether anything needs it."""

import json
from collections import defaultdict
from typing import Any

from vila_ops.artifacts.backend import Entry
from vila_ops.artifacts.kinds import Checkpoint
from vila_ops.artifacts.store import KINDS, MANIFEST, backend, find_manifest, root_of
from vila_ops.config import Config
from vila_ops.errors import CorruptArtifact
from vila_ops.train.checkpoint.storage import STEP

LABEL = "stage.json"
"""File of a resume folder that says which stage it is of."""


class ResumeFolder(Config):
    """The folder `resume/<address>` of a store."""

    place: str
    address: str
    """Key of the checkpoint that the stage will become, or became."""
    stage: str | None
    """Name of the stage; None if an earlier version wrote the folder, or its label is damaged."""
    step: int | None
    """Steps done at its newest resume checkpoint; None without one."""
    num_bytes: int
    changed: float
    """Time of the last change, in seconds since 1970."""
    sealed: bool
    """Whether the stage was finished, so that nothing needs the folder."""


def write_label(resume: str, stage: str) -> None:
    """Record in a resume folder which stage it is of."""
    backend(resume).create(f"{resume}/{LABEL}", json.dumps({"stage": stage}).encode())


def resume_folders(store: str) -> list[ResumeFolder]:
    """All resume folders of a store, by address."""
    root = root_of(store)
    by_address: dict[str, list[Entry]] = defaultdict(list)
    for entry in backend(root).entries(f"{root}/resume"):
        address, _, name = entry.name.partition("/")
        if not address.startswith("."):  # one that is being removed
            by_address[address].append(entry._replace(name=name))
    return [_folder(root, address, entries) for address, entries in sorted(by_address.items())]


def _folder(root: str, address: str, entries: list[Entry]) -> ResumeFolder:
    place = f"{root}/resume/{address}"
    steps = [name for entry in entries if (name := entry.name).startswith(STEP) and name.endswith(f"/{MANIFEST}")]
    return ResumeFolder(
        place=place,
        address=address,
        stage=_stage_of(place),
        step=max((int(name.split("/")[0].split("-")[1]) for name in steps), default=None),
        num_bytes=sum(entry.size for entry in entries),
        changed=max(entry.changed for entry in entries),
        sealed=_is_sealed(f"{root}/{KINDS[Checkpoint]}/{address}"),
    )


def _stage_of(place: str) -> str | None:
    try:
        stated: Any = json.loads(backend(place).read(f"{place}/{LABEL}") or b"null")
    except ValueError:
        return None
    stage = stated.get("stage") if isinstance(stated, dict) else None
    return stage if isinstance(stage, str) else None


def _is_sealed(uri: str) -> bool:
    try:
        return find_manifest(uri) is not None
    except CorruptArtifact:  # it has to be trained again, and may go on from here
        return False
