"""Which samples a step's loss came from: those that broke it, and those of a spike.

SCRATCH/watch/<address>/stopped-step-000012.json   a step whose loss or gradient was no number, its samples named
SCRATCH/watch/<address>/spikes.jsonl               a line for each step whose loss stood out

S samples of the global batch.
"""

import json
import logging
import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vila_ops.data.loading.loader import RowLoader
from vila_ops.data.loading.packing import PackedRow
from vila_ops.data.shards import find_rows
from vila_ops.tracking import MetricLog
from vila_ops.train.checkpoint.checkpointer import Curve
from vila_ops.train.job import BadSamples, NonFiniteLoss, Stopped, TrainJob
from vila_ops.train.watchdog import StepWatchdog

WINDOW, LEAST = 128, 32
"""Steps before a step that it is compared with, and how many there must be."""
DEVIATIONS = 7.0
"""How far above the median a spike is, as in the spike score of OLMo 2 (arXiv:2501.00656), there in standard deviations
from the mean of 1000 steps; from fewer steps, and some of them spikes, median and MAD are told more surely."""
MAD_TO_DEVIATION = 1.4826
"""Of a normal distribution (Hampel 1974)."""
FLAT = 0.01
"""Of the median: the least that counts as a deviation, for a loss that hardly moves."""
WORST = 10
"""Samples that are named of a spike."""
NAMED = 8
"""Samples that stand in a message; all are in the file."""
log = logging.getLogger(__name__)


class LossHistory(NamedTuple):
    """Of each sample of the global batch of a step."""

    keys: list[str]
    """(S,)"""
    sums: NDArray[np.float64]
    """(S,) nats"""
    targets: NDArray[np.float64]
    """(S,) tokens"""


class BadSampleFinder:
    """Of one rank of a stage; every rank asks it the same questions."""

    def __init__(self, job: TrainJob, watch: StepWatchdog, rows: RowLoader, curve: Curve, metrics: MetricLog) -> None:
        """`curve` is what was trained before: a stage that goes on compares with it. Rank 0's `metrics` are told."""
        self.job, self.watch, self.rows, self.metrics = job, watch, rows, metrics
        self._before = deque((row["loss"] for row in curve if "loss" in row), maxlen=WINDOW)
        self._seen: list[tuple[list[PackedRow], Tensor]] = []
        self._high = False

    def begin(self, own: list[PackedRow]) -> None:
        """A step begins with these rows of this rank."""
        self._seen = []
        self.watch.reads(tuple(key for row in own for key in row.keys))

    def saw(self, rows: list[PackedRow], each: Tensor) -> None:
        """A micro-batch and the losses of its targets (N,), which stay where they are until somebody asks."""
        self._seen.append((rows, each))

    def check(self, what: str, value: float, *, step: int) -> None:
        """Raise NonFiniteLoss, the samples to blame named, where a value that all ranks have is no number.

        A sample that breaks its own loss breaks those that share its row too: a weight of nothing times what is no
        number is no number in attention.
        """
        if math.isfinite(value):
            return
        losses = self._of_all_ranks(step)
        broken = ~np.isfinite(losses.sums)
        keys = [key for key, bad in zip(losses.keys, broken, strict=True) if bad or not broken.any()]
        named = self._records(keys)
        path = self.watch.folder / f"stopped-step-{step + 1:06d}.json"
        record = Stopped(
            stage=self.job.stage.name,
            mixture=self.job.stage.mixture.name,
            data=self.job.data.digest,
            step=step + 1,
            what=what,
            value=str(value),
            samples=tuple(named),
        )
        if self.watch.place.rank == 0:
            path.write_text(record.model_dump_json(indent=1))
            self.metrics.attach(path)
        if broken.all():
            why = f"All {len(keys)} samples of the step have such a loss, so it is rather the weights than the data"
        elif broken.any():
            why = f"{len(keys)} of the {len(losses.keys)} samples of the step have such a loss"
        else:
            why = f"Each of the {len(keys)} samples of the step has a finite loss, so all of them are named"
        told = ", ".join(f"{one.source} {one.id!r} ({one.key})" for one in named[:NAMED])
        more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
        command = self.job.context.suggest("data quarantine")
        raise NonFiniteLoss(
            f"{self.job.stage.name}: {what} {value} at step {step + 1}; nothing was updated. {why}: {told}{more}; "
            f"{path} has them all. To train without their records: {command} --from {path}"
        )

    def look(self, step: int, loss: float) -> None:
        """Record a loss that stands out after `step` steps, once until it is back; training goes on."""
        before, was_high = list(self._before), self._high
        self._before.append(loss)
        self._high = is_spike(loss, before)
        if not self._high or was_high:
            return
        losses = self._of_all_ranks(step - 1)
        if self.watch.place.rank:
            return
        mean = losses.sums / np.maximum(losses.targets, 1)
        worst = np.argsort(-mean, kind="stable")[:WORST].tolist()
        named = {one.key: one for one in self._records([losses.keys[number] for number in worst])}
        samples = [
            {**named[losses.keys[n]].model_dump(), "loss": float(mean[n]), "targets": int(losses.targets[n])}
            for n in worst
        ]
        record = {"step": step, "loss": loss, "median": float(np.median(before)), "samples": samples}
        path = self.watch.folder / "spikes.jsonl"
        with path.open("a") as file:
            file.write(json.dumps({"stage": self.job.stage.name, **record}) + "\n")
        first = samples[0]
        log.warning(
            "%s: loss %.3f at step %d stands out from %.3f before it; highest of its samples: %s %r (%s) with %.3f; %s",
            self.job.stage.name, loss, step, record["median"], first["source"], first["id"], first["key"],
            first["loss"], path,
        )  # fmt: skip
        self.metrics.log({"loss_spike": loss}, step=step)
        self.metrics.attach(path)

    def _of_all_ranks(self, step: int) -> LossHistory:
        """The loss of each sample of the global batch; every rank must ask. Each fills in its own samples."""
        place = self.watch.place
        keys = self.rows.keys(step)
        share = len(keys) // place.world_size
        first = sum(map(len, keys[: place.rank * share]))
        own = np.concatenate([np.zeros((2, 0)), *(by_sample(rows, each) for rows, each in self._seen)], axis=1)
        whole = torch.zeros(2, sum(map(len, keys)), dtype=torch.float64)
        whole[:, first : first + own.shape[1]] = torch.from_numpy(own)
        if torch.distributed.is_initialized():
            on_device = whole.cuda() if torch.distributed.get_backend() == "nccl" else whole
            torch.distributed.all_reduce(on_device)
            whole = on_device.cpu()
        sums, targets = whole.numpy()
        return LossHistory([key for row in keys for key in row], sums, targets)

    def _records(self, keys: Sequence[str]) -> list[BadSamples]:
        """Key, source and record of samples, in their order, each once."""
        found = {row["key"]: row for row in find_rows(self.job.data, keys)}
        return [BadSamples(key=key, source=found[key]["source"], id=found[key]["id"]) for key in dict.fromkeys(keys)]


def is_spike(loss: float, before: Sequence[float]) -> bool:
    """Whether a loss is DEVIATIONS above the median of those before it, the deviation told by their MAD."""
    if len(before) < LEAST:
        return False
    median = float(np.median(before))
    deviation = MAD_TO_DEVIATION * float(np.median(np.abs(np.asarray(before) - median)))
    return loss - median > DEVIATIONS * max(deviation, FLAT * median)


def by_sample(rows: Sequence[PackedRow], each: Tensor) -> NDArray[np.float64]:
    """(2, S): the summed loss of each sample of some rows, and its targets, of the losses of all targets (N,)."""
    losses = each.detach().double().cpu().numpy()
    parts, start = [], 0
    for row in rows:
        sample = row.samples_of_targets()
        own = losses[start : start + len(sample)]
        start += len(sample)
        sums = np.bincount(sample, weights=own, minlength=len(row.keys))
        parts.append(np.stack([sums, np.bincount(sample, minlength=len(row.keys))]))
    assert start == len(losses), f"{len(losses)} losses of {start} targets"
    return np.concatenate(parts, axis=1)
