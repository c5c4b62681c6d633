"""What the loop calls: restore, save beside the training, and keep by policy."""

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

from vila_ops.artifacts.backend import AT_ONCE, CorruptArtifact, FileFacts
from vila_ops.artifacts.store import MANIFEST
from vila_ops.config import Resources
from vila_ops.config.resources import Retention
from vila_ops.train.checkpoint.rank_file import RankFile, StagingBuffers
from vila_ops.train.checkpoint.ranks import Ranks
from vila_ops.train.checkpoint.storage import storage_of
from vila_ops.train.engine import Engine, State
from vila_ops.train.job import RankInfo

FORMAT = 1
Curve = list[dict[str, Any]]
"""Per step: its number, loss, and validation loss where there was one."""
States = dict[str, dict[str, Tensor]]
log = logging.getLogger(__name__)


class Checkpointer:
    """The resume checkpoints of a stage. Every rank makes one and calls the same methods at the same steps.

    A save only takes copies: a thread writes this rank's share and forces it to the disk, rank 0's then seals, and
    removes what need not stay. The copies of live tensors (see Engine) are taken by the thread too, while the loop
    computes gradients: `settle` waits for them, and has to be called before the engine's step. One save at most is
    under way. What fails in the thread is logged there, and raised on every rank by its next `save` or by `close`.
    """

    def __init__(self, resume: str, place: RankInfo, resources: Resources, *, live: bool) -> None:
        self.stall_seconds = 0.0
        """How long the loop waited for checkpoints so far."""
        self._place, self._keep, self._live = place, resources.train.keep, live
        self._shelf = storage_of(resume)
        self._ranks = Ranks(place, timeout_seconds=resources.train.network.timeout_seconds)
        self._attempt = self._ranks.gather(secrets.token_hex(4))[0]
        self._found: set[int] = set()
        """Steps of the checkpoints that were there when this attempt began, as rank 0 saw them."""
        self._copies = StagingBuffers()
        self._copied = threading.Event()
        self._copied.set()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: Future[None] | None = None

    def restore(self, engine: Engine) -> tuple[int, Curve]:
        """Steps done and their curve: 0 and nothing when there is no checkpoint to resume from."""
        found = self.newest()
        if found is None:
            return 0, []
        states, manifest = found
        engine.restore(states, step=manifest["step"])
        self._ranks.gather(None)  # ranks of one machine share its copies
        self._shelf.release()
        log.info("resuming after step %d", manifest["step"])
        return manifest["step"], manifest["curve"]

    def newest(self) -> tuple[States, dict[str, Any]] | None:
        """Tensors by name, and the manifest, of the newest checkpoint whose every byte is as it was written.

        None if there is none. A damaged one is named in the log and the one before it is taken, by all ranks.
        """
        for name in reversed(self._ranks.together(self._look)[0]):
            try:
                found = self._read(name)
            except CorruptArtifact as error:
                log.warning("resume checkpoint %s is damaged (%s); the one before it is taken", name, error)
                found = None
            read = self._ranks.gather(None if found is None else found[1]["checksum"])
            if found is not None and all(checksum == read[0] for checksum in read):
                return found
        return None

    def save(self, step: int, states: Iterable[State], curve: Curve) -> None:
        """Begin to save the state after `step` steps; `states` are walked through by every rank."""
        started = time.monotonic()
        self._finish()
        own: dict[str, Tensor] = {}
        for number, (name, tensors) in enumerate(states):
            if number % self._place.world_size == self._place.rank:
                own |= {f"{key}/{name}": self._taken(f"{key}/{name}", tensor) for key, tensor in tensors.items()}
        on_gpu = any(tensor.is_cuda for tensor in own.values())
        since = torch.cuda.current_stream().record_event() if on_gpu else None
        self._copied.clear()
        self._under_way = self._writer.submit(self._save, step, own, list(curve), since)
        self.stall_seconds += time.monotonic() - started

    def settle(self) -> None:
        """Wait until the state is copied: to be called before what changes it, the engine's step."""
        if not self._copied.is_set():
            started = time.monotonic()
            self._copied.wait()
            self.stall_seconds += time.monotonic() - started

    def close(self) -> None:
        """Wait for the save that is under way: to be called at the end."""
        started = time.monotonic()
        self._finish()
        self.stall_seconds += time.monotonic() - started

    def _finish(self) -> None:
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def _taken(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor that may wait for the thread: a live one as it is, a gathered one not on the GPU."""
        return tensor if self._live or not tensor.is_cuda else self._copies.take(name, tensor)

    def _save(self, step: int, own: dict[str, Tensor], curve: Curve, since: torch.cuda.Event | None) -> None:
        """The thread's work."""
        try:
            try:
                if self._live:
                    own = self._copies.take_all(own, since=since)
            finally:
                self._copied.set()
            self._write(f"step-{step:06d}-{self._attempt}", RankFile(own), step, curve)
        except Exception:
            log.exception("the resume checkpoint after step %d was not saved", step)
            raise

    def _write(self, draft: str, share: RankFile, step: int, curve: Curve) -> None:
        """Every rank writes its share, then rank 0 seals, then it removes; one that fails stops all."""
        world_size, first = self._place.world_size, self._place.rank == 0
        names = [f"rank-{rank:05d}-of-{world_size:05d}.safetensors" for rank in range(world_size)]

        def write() -> FileFacts:
            self._shelf.write(draft, names[self._place.rank], share)
            return share.facts()

        try:
            files = dict(zip(names, self._ranks.together(write), strict=True))
            manifest = {"format": FORMAT, "step": step, "world_size": world_size, "files": files, "curve": curve}
            sizes = {name: file["size"] for name, file in files.items()}
            self._ranks.together(lambda: self._shelf.seal(draft, _text(manifest), sizes) if first else None)
        except (OSError, ValueError):
            if first:
                self._shelf.discard(draft)
            raise
        self._ranks.together(lambda: self._tidy(step, curve) if first else None)

    def _tidy(self, step: int, curve: Curve) -> None:
        """Remove what need not stay.

        One of a later step is damaged if it was there when this attempt began, which went on from one before it; else
        it is of an attempt that took over while this one was cut off, and stays.
        """
        sealed = self._shelf.sealed()
        stay = to_keep([one.step for one in sealed if one.step <= step], curve, self._keep)
        for one in sealed:
            if one.step not in stay and (one.step <= step or one.step in self._found):
                self._shelf.remove(one.name)

    def _look(self) -> list[str]:
        """The checkpoints there are, as rank 0 sees them before anything of this attempt is there."""
        if self._place.rank:
            return []
        self._shelf.clear()
        sealed = self._shelf.sealed()
        self._found = {one.step for one in sealed}
        return [one.name for one in sealed]

    def _read(self, name: str) -> tuple[States, dict[str, Any]]:
        """Tensors and manifest of a checkpoint. Raises CorruptArtifact."""
        manifest = _parsed(self._shelf.manifest(name))
        with ThreadPoolExecutor(AT_ONCE) as pool:
            paths = list(pool.map(lambda one: self._shelf.file(name, *one), manifest["files"].items()))
        states: States = {}
        for path in paths:
            for key, tensor in load_file(path).items():
                kind, _, parameter = key.partition("/")
                states.setdefault(parameter, {})[kind] = tensor
        return states, manifest


def to_keep(steps: Iterable[int], curve: Curve, keep: Retention) -> set[int]:
    """Of the steps that have a checkpoint those whose checkpoint stays."""
    ordered = sorted(steps)
    losses = {
        row["step"]: row["validation_loss"] for row in curve if math.isfinite(row.get("validation_loss", math.nan))
    }
    best = sorted((step for step in ordered if step in losses), key=lambda step: (losses[step], step))
    spaced = [step for step in ordered if keep.every is not None and step % keep.every == 0]
    return {*ordered[-keep.last :], *spaced, *best[: keep.best]}


def _text(manifest: dict[str, Any]) -> bytes:
    """The one text of a manifest, its own checksum in it: any other byte in the file is damage."""
    checksum = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps({**manifest, "checksum": checksum}).encode()


def _parsed(text: bytes) -> dict[str, Any]:
    """A manifest, with its checksum. Raises CorruptArtifact for one that is not as it was written."""
    try:
        manifest: dict[str, Any] = json.loads(text)
        if text != _text({key: value for key, value in manifest.items() if key != "checksum"}):
            raise ValueError("it was changed after sealing")
    except (ValueError, AttributeError) as error:
        raise CorruptArtifact(f"{MANIFEST}: {error}") from error
    if manifest["format"] != FORMAT:
        raise CorruptArtifact(f"{MANIFEST} has format {manifest['format']}; this version reads {FORMAT}")
    return manifest
