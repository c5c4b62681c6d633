"""Resume checkpoints for the training loop: restore, save in the background, and keep by policy."""

import hashlib
import json
import logging
import math
import secrets
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vila_ops.artifacts.backend import AT_ONCE, FileFacts
from vila_ops.artifacts.store import MANIFEST, backend
from vila_ops.artifacts.store_format import refuse_other
from vila_ops.config import Resources
from vila_ops.config.resources import Retention
from vila_ops.device import on_accelerator
from vila_ops.errors import CorruptArtifact, VilaError
from vila_ops.train.checkpoint.rank_file import RankFile, StagingBuffers
from vila_ops.train.checkpoint.ranks import Ranks
from vila_ops.train.checkpoint.storage import CheckpointStorage, storage_of
from vila_ops.train.engine import State, TrainEngine
from vila_ops.train.job import RankInfo
from vila_ops.train.progress import CHECKPOINT

FORMAT = 1
Curve = list[dict[str, Any]]
"""One entry per step: its number, its loss, and its validation loss if there was one."""
States = dict[str, dict[str, Tensor]]
log = logging.getLogger(__name__)


class Checkpointer:
    """Saves and restores the resume checkpoints of a stage. All ranks call the same methods at the same steps.

    `save` only copies tensors. A thread writes and syncs this rank's file; on rank 0 it then seals the checkpoint and
    removes old ones. If the tensors are live (see TrainEngine), the thread makes the copies too, while the loop
    computes gradients, and the loop has to call `wait_for_staging` before the engine's step. At most one save is in
    progress.
    An error in the thread is logged there, and raised on every rank by the next `save` or by `close`.
    """

    def __init__(self, resume: str, rank_info: RankInfo, resources: Resources, *, live: bool) -> None:
        self.stall_seconds = 0.0
        """Seconds that the loop has waited for checkpoints so far."""
        self.saved_at: dict[str, float] = {}
        """When this attempt last sealed a checkpoint, in seconds since 1970, by the name that a heartbeat gives it."""
        self._rank_info, self._keep, self._live = rank_info, resources.train.keep, live
        self._storage = storage_of(resume)
        self._ranks = Ranks(rank_info, timeout_seconds=resources.train.network.timeout_seconds)
        self._attempt = self._ranks.gather(secrets.token_hex(4))[0]
        self._earlier_steps: set[int] = set()
        """Steps of the checkpoints that existed when this attempt began, on rank 0."""
        self._buffers = StagingBuffers()
        self._staged = threading.Event()
        self._staged.set()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def restore(self, engine: TrainEngine) -> tuple[int, Curve]:
        """Restore the newest checkpoint. Returns the steps done and their curve: 0 and [] without a checkpoint."""
        newest = self.newest()
        if newest is None:
            return 0, []
        states, manifest = newest
        engine.restore(states, step=manifest["step"])
        self._ranks.gather(None)  # ranks on one machine share its copies of the files
        self._storage.release()
        log.info("resuming after step %d", manifest["step"])
        return manifest["step"], manifest["curve"]

    def newest(self) -> tuple[States, dict[str, Any]] | None:
        """Return tensors by name, and the manifest, of the newest checkpoint whose checksums match on all ranks.

        Returns None if there is none. A damaged checkpoint is logged and skipped by all ranks.
        """
        for name in reversed(self._ranks.run_on_all(self._list_sealed)[0]):
            try:
                checkpoint = read_checkpoint(self._storage, name)
            except CorruptArtifact as error:
                log.warning("resume checkpoint %s is damaged (%s); the checkpoint before it is used", name, error)
                checkpoint = None
            checksums = self._ranks.gather(None if checkpoint is None else checkpoint[1]["checksum"])
            if checkpoint is not None and all(checksum == checksums[0] for checksum in checksums):
                return checkpoint
        return None

    def save(self, step: int, states: Iterable[State], curve: Curve) -> None:
        """Start to save the state after `step` steps. Every rank iterates over all `states` and saves its share."""
        started = time.monotonic()
        self._wait_for_pending()
        share: dict[str, Tensor] = {}
        for number, (name, tensors) in enumerate(states):
            if number % self._rank_info.world_size == self._rank_info.rank:
                share |= {f"{key}/{name}": self._hold(f"{key}/{name}", tensor) for key, tensor in tensors.items()}
        device = next((tensor.device for tensor in share.values() if on_accelerator(tensor)), None)
        since = None if device is None else torch.accelerator.current_stream(device).record_event()
        self._staged.clear()
        self._pending = self._writer.submit(self._save, step, share, list(curve), since)
        self.stall_seconds += time.monotonic() - started

    def wait_for_staging(self) -> None:
        """Wait until the state of the last save is copied. Call this before the engine's step changes the state."""
        if not self._staged.is_set():
            started = time.monotonic()
            self._staged.wait()
            self.stall_seconds += time.monotonic() - started

    def close(self) -> None:
        """Wait for the save in progress. Call this at the end of training."""
        started = time.monotonic()
        self._wait_for_pending()
        self.stall_seconds += time.monotonic() - started

    def _wait_for_pending(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _hold(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor to hand to the thread: a live tensor itself, and a copy in host memory of a gathered one."""
        return tensor if self._live or not on_accelerator(tensor) else self._buffers.copy(name, tensor)

    def _save(self, step: int, share: dict[str, Tensor], curve: Curve, since: torch.Event | None) -> None:
        """Stage and write a checkpoint; the thread runs this."""
        try:
            try:
                if self._live:
                    share = self._buffers.copy_all(share, since=since)
            finally:
                self._staged.set()
            self._write(f"step-{step:06d}-{self._attempt}", RankFile(share), step, curve)
        except Exception:
            log.exception("the resume checkpoint after step %d was not saved", step)
            raise

    def _write(self, draft: str, rank_file: RankFile, step: int, curve: Curve) -> None:
        """Write all rank files, then seal and remove old checkpoints on rank 0. A failure on one rank stops all."""
        world_size, first = self._rank_info.world_size, self._rank_info.rank == 0
        names = [f"rank-{rank:05d}-of-{world_size:05d}.safetensors" for rank in range(world_size)]

        def write() -> FileFacts:
            self._storage.write(draft, names[self._rank_info.rank], rank_file, rank_file.size)
            return rank_file.facts()

        try:
            files = dict(zip(names, self._ranks.run_on_all(write), strict=True))
            manifest = {"format": FORMAT, "step": step, "world_size": world_size, "files": files, "curve": curve}
            sizes = {name: file["size"] for name, file in files.items()}
            self._ranks.run_on_all(lambda: self._storage.seal(draft, _to_bytes(manifest), sizes) if first else None)
        except (OSError, ValueError, VilaError):  # after the death of a rank the next attempt removes the draft
            if first:
                self._storage.discard(draft)
            raise
        self.saved_at = {CHECKPOINT: time.time()}
        self._ranks.run_on_all(lambda: self._remove_old(step, curve) if first else None)

    def _remove_old(self, step: int, curve: Curve) -> None:
        """Remove the checkpoints that the policy does not keep.

        A checkpoint of a later step is damaged if it existed when this attempt began, as this attempt resumed from an
        earlier one. Otherwise it belongs to an attempt that took over while this one was cut off, and it is kept.
        """
        sealed = self._storage.sealed()
        kept = to_keep([one.step for one in sealed if one.step <= step], curve, self._keep)
        for one in sealed:
            if one.step not in kept and (one.step <= step or one.step in self._earlier_steps):
                self._storage.remove(one.name)

    def _list_sealed(self) -> list[str]:
        """On rank 0, remove drafts of killed attempts and return the names of the checkpoints, oldest first."""
        if self._rank_info.rank:
            return []
        for draft in self._storage.drafts():
            backend(draft).remove(draft)
        sealed = self._storage.sealed()
        self._earlier_steps = {one.step for one in sealed}
        return [one.name for one in sealed]


def read_checkpoint(storage: CheckpointStorage, name: str) -> tuple[States, dict[str, Any]]:
    """Read and verify a checkpoint. Returns its tensors by name, and its manifest. Raises CorruptArtifact."""
    manifest = _parse(storage.manifest(name), f"{storage.root}/{name}/{MANIFEST}")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        paths = list(pool.map(lambda one: storage.file(name, *one), manifest["files"].items()))
    states: States = {}
    for path in paths:
        for key, tensor in load_file(path).items():
            kind, _, parameter = key.partition("/")
            states.setdefault(parameter, {})[kind] = tensor
    return states, manifest


def to_keep(steps: Iterable[int], curve: Curve, keep: Retention) -> set[int]:
    """Return the steps whose checkpoint is kept, of all steps that have one."""
    ordered = sorted(steps)
    losses = {
        row["step"]: row["validation_loss"] for row in curve if math.isfinite(row.get("validation_loss", math.nan))
    }
    best = sorted((step for step in ordered if step in losses), key=lambda step: (losses[step], step))
    spaced = [step for step in ordered if keep.every is not None and step % keep.every == 0]
    return {*ordered[-keep.last :], *spaced, *best[: keep.best]}


def _to_bytes(manifest: dict[str, Any]) -> bytes:
    """Return the exact bytes of a manifest's file, which include its own checksum."""
    checksum = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps({**manifest, "checksum": checksum}).encode()


def _parse(text: bytes, place: str) -> dict[str, Any]:
    """Return a manifest with its checksum. Raises CorruptArtifact if any byte of it has changed."""
    try:
        manifest: dict[str, Any] = json.loads(text)
        if text != _to_bytes({key: value for key, value in manifest.items() if key != "checksum"}):
            raise ValueError("it was changed after sealing")
    except (ValueError, AttributeError) as error:
        raise CorruptArtifact(f"{place}: {error}") from error
    refuse_other(place, manifest["format"], reads=FORMAT)
    return manifest
