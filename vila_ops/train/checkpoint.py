"""Resume checkpoints: fp32 parameters and moments by name, in safetensors, free of any world size.

resume/<address>/step-000050/rank-00000-of-00002.safetensors   each rank writes its share of the names
resume/<address>/step-000050/manifest.json                     last, by one rename: sizes, sha256, the curve so far
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vila_ops.artifacts.disk import sha256, sync
from vila_ops.artifacts.store import MANIFEST
from vila_ops.train.engine import Engine, State
from vila_ops.train.job import Place

KEEP = 2
Curve = list[dict[str, Any]]
"""Per step: its number, loss, and validation loss where there was one."""
log = logging.getLogger(__name__)


def restore(engine: Engine, folder: Path) -> tuple[int, Curve]:
    """Steps done and their curve: 0 and nothing when there is no checkpoint to resume from."""
    found = newest(folder)
    if found is None:
        return 0, []
    states, manifest = found
    engine.restore(states, step=manifest["step"])
    log.info("resuming after step %d", manifest["step"])
    return manifest["step"], manifest["curve"]


def save(folder: Path, *, step: int, states: Iterable[State], curve: Curve, place: Place) -> None:
    """Write the state after `step` steps; every rank calls it. Afterwards the newest KEEP checkpoints are left."""
    target = folder / f"step-{step:06d}"
    draft = folder / f".step-{step:06d}"
    if place.rank == 0:
        shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed while it wrote
        draft.mkdir(parents=True)
    _barrier()
    own: dict[str, Tensor] = {}
    for number, (name, tensors) in enumerate(states):  # a collective: every rank walks through all of it
        if number % place.world_size == place.rank:
            own |= {f"{key}/{name}": tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    path = draft / f"rank-{place.rank:05d}-of-{place.world_size:05d}.safetensors"
    save_file(own, path)
    sync(path)
    _barrier()
    if place.rank == 0:
        files = {p.name: {"size": p.stat().st_size, "sha256": sha256(p)} for p in sorted(draft.glob("*.safetensors"))}
        manifest = {"format": 1, "step": step, "world_size": place.world_size, "files": files, "curve": curve}
        (draft / MANIFEST).write_text(json.dumps({**manifest, "checksum": _checksum(manifest)}))
        sync(draft / MANIFEST)
        shutil.rmtree(target, ignore_errors=True)  # a damaged one, which this run did not resume from
        os.rename(draft, target)
        sync(folder)
        for old in _steps(folder)[:-KEEP]:
            shutil.rmtree(old)
    _barrier()


def newest(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """The newest checkpoint whose every byte is as written: tensors by name, and its manifest. None if there is none.

    A damaged one is named in the log and the one before it is taken.
    """
    for path in reversed(_steps(folder)):
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            return _read(path, manifest), manifest
        except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
            log.warning("resume checkpoint %s is damaged (%s); the one before it is taken", path, error)
    return None


def _read(path: Path, manifest: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    if manifest.pop("checksum") != _checksum(manifest):
        raise ValueError(f"{MANIFEST} differs from its checksum")
    states: dict[str, dict[str, Tensor]] = {}
    for name, expected in manifest["files"].items():
        if sha256(path / name) != expected["sha256"]:
            raise ValueError(f"{name} differs from its sha256")
        for key, tensor in load_file(path / name).items():
            kind, _, parameter = key.partition("/")
            states.setdefault(parameter, {})[kind] = tensor
    return states


def _checksum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _steps(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if (path / MANIFEST).is_file())


def _barrier() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
