"""Bad-sample attribution: the samples behind a step whose loss is not finite, and behind a loss spike.

SCRATCH/diagnostics/<address>/bad-samples-step-000012.json   a step whose loss or gradient norm is not finite
SCRATCH/diagnostics/<address>/loss-spikes.jsonl              one line per loss spike

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
from vila_ops.errors import NonFiniteLoss
from vila_ops.tracking import MetricLog
from vila_ops.train.checkpoint.checkpointer import Curve
from vila_ops.train.job import BadSample, BadSampleReport, TrainJob
from vila_ops.train.watchdog import StepWatchdog

WINDOW, LEAST = 128, 32
"""Number of previous steps that a loss is compared with, and the fewest with which it is compared."""
DEVIATIONS = 7.0
"""Deviations above the median from which a loss is a spike. The spike score of OLMo 2 (arXiv:2501.00656) uses the same
number of standard deviations from the mean of 1000 steps. Median and MAD are more robust if there are fewer steps, and
spikes among them."""
MAD_TO_DEVIATION = 1.4826
"""Ratio of standard deviation to MAD for a normal distribution (Hampel 1974)."""
FLAT = 0.01
"""Share of the median that is the smallest deviation, for a loss that hardly changes."""
WORST = 10
"""Number of samples that are recorded for a spike."""
NAMED = 8
"""Number of samples in a message. The file has all of them."""
log = logging.getLogger(__name__)


class SampleLosses(NamedTuple):
    """The loss of each sample of a step's global batch."""

    keys: list[str]
    """(S,)"""
    sums: NDArray[np.float64]
    """(S,), summed token loss in nats."""
    targets: NDArray[np.float64]
    """(S,), number of target tokens."""


class BadSampleFinder:
    """Names the samples of steps that went wrong. All ranks call the same methods at the same steps."""

    def __init__(
        self, job: TrainJob, watchdog: StepWatchdog, row_loader: RowLoader, curve: Curve, metrics: MetricLog
    ) -> None:
        """`curve` holds the losses before a resume, which spikes are compared with. Rank 0 logs to `metrics`."""
        self.job, self.watchdog, self.row_loader, self.metrics = job, watchdog, row_loader, metrics
        self.rank_info = watchdog.rank_info
        self._recent = deque((row["loss"] for row in curve if "loss" in row), maxlen=WINDOW)
        self._micro_batches: list[tuple[list[PackedRow], Tensor]] = []
        self._in_spike = False

    def begin_step(self) -> None:
        """Forget the micro-batches of the step before."""
        self._micro_batches = []

    def begin_micro_batch(self, rows: list[PackedRow]) -> None:
        """Begin to compute with some of this rank's rows."""
        self.watchdog.set_samples(tuple(key for row in rows for key in row.keys))

    def add(self, rows: list[PackedRow], token_losses: Tensor) -> None:
        """Add a micro-batch and its (N,) token losses, which stay on their device until they are needed."""
        self._micro_batches.append((rows, token_losses))

    def check_finite(self, what: str, value: float, *, step: int) -> None:
        """Raise NonFiniteLoss, with the samples behind it, if a value that all ranks share is not finite.

        A sample whose own loss is not finite makes the losses of its row not finite: attention multiplies its values
        with weights of 0, and 0 times NaN is NaN.
        """
        if math.isfinite(value):
            return
        losses = self._gather_sample_losses(step)
        broken = ~np.isfinite(losses.sums)
        keys = [key for key, bad in zip(losses.keys, broken, strict=True) if bad or not broken.any()]
        samples = self._records(keys)
        path = self.watchdog.folder / f"bad-samples-step-{step + 1:06d}.json"
        report = BadSampleReport(
            stage=self.job.stage.name,
            mixture=self.job.stage.mixture.name,
            data=self.job.data.digest,
            step=step + 1,
            what=what,
            value=str(value),
            samples=tuple(samples),
        )
        if self.rank_info.rank == 0:
            path.write_text(report.model_dump_json(indent=1))
            self.metrics.attach(path)
        if broken.all():
            cause = (
                f"All {len(keys)} samples of the step have such a loss, so rather the weights are broken than the data"
            )
        elif broken.any():
            cause = f"{len(keys)} of the {len(losses.keys)} samples of the step have such a loss"
        else:
            cause = f"Each of the {len(keys)} samples of the step has a finite loss, so all of them are listed"
        listed = ", ".join(f"{one.source} {one.id!r} ({one.key})" for one in samples[:NAMED])
        more = f" and {len(samples) - NAMED} more" if len(samples) > NAMED else ""
        command = self.job.context.suggest("data quarantine")
        raise NonFiniteLoss(
            f"{self.job.stage.name}: {what} {value} at step {step + 1}; nothing was updated. {cause}: {listed}{more}; "
            f"{path} lists all. To train without their records: {command} --from {path}"
        )

    def check_spike(self, step: int, loss: float) -> None:
        """Record the loss after `step` steps if it is a spike, once per spike. Training goes on."""
        recent, was_in_spike = list(self._recent), self._in_spike
        self._recent.append(loss)
        self._in_spike = is_spike(loss, recent)
        if not self._in_spike or was_in_spike:
            return
        losses = self._gather_sample_losses(step - 1)
        if self.rank_info.rank:
            return
        mean = losses.sums / np.maximum(losses.targets, 1)
        worst = np.argsort(-mean, kind="stable")[:WORST].tolist()
        records = {one.key: one for one in self._records([losses.keys[number] for number in worst])}
        samples = [
            {**records[losses.keys[n]].model_dump(), "loss": float(mean[n]), "targets": int(losses.targets[n])}
            for n in worst
        ]
        spike = {"step": step, "loss": loss, "median": float(np.median(recent)), "samples": samples}
        path = self.watchdog.folder / "loss-spikes.jsonl"
        with path.open("a") as file:
            file.write(json.dumps({"stage": self.job.stage.name, **spike}) + "\n")
        first = samples[0]
        log.warning(
            "%s: loss spike: %.3f at step %d, the median before it is %.3f; its sample with the highest loss, %.3f, is "
            "%s %r (%s); %s lists more",
            self.job.stage.name, loss, step, spike["median"], first["loss"], first["source"], first["id"], first["key"],
            path,
        )  # fmt: skip
        self.metrics.log_once({"loss_spike": loss}, step=step)
        self.metrics.attach(path)

    def _gather_sample_losses(self, step: int) -> SampleLosses:
        """Return the loss of each sample of the global batch. All ranks must call this; each adds its own samples."""
        keys = self.row_loader.keys(step)
        rows_per_rank = len(keys) // self.rank_info.world_size
        start = sum(map(len, keys[: self.rank_info.rank * rows_per_rank]))
        parts = (sum_by_sample(rows, token_losses) for rows, token_losses in self._micro_batches)
        local = np.concatenate([np.zeros((2, 0)), *parts], axis=1)
        summed = torch.zeros(2, sum(map(len, keys)), dtype=torch.float64)
        summed[:, start : start + local.shape[1]] = torch.from_numpy(local)
        if torch.distributed.is_initialized():
            on_device = summed.to(self._micro_batches[0][1].device)  # that of the collectives
            torch.distributed.all_reduce(on_device)
            summed = on_device.cpu()
        sums, targets = summed.numpy()
        return SampleLosses([key for row in keys for key in row], sums, targets)

    def _records(self, keys: Sequence[str]) -> list[BadSample]:
        """Return key, source and record id of samples, in the order of `keys` and without repetitions."""
        rows = {row["key"]: row for row in find_rows(self.job.data, keys)}
        return [BadSample(key=key, source=rows[key]["source"], id=rows[key]["id"]) for key in dict.fromkeys(keys)]


def is_spike(loss: float, recent: Sequence[float]) -> bool:
    """Return whether a loss is more than DEVIATIONS above the median of recent losses; their MAD is the deviation."""
    if len(recent) < LEAST:
        return False
    median = float(np.median(recent))
    deviation = MAD_TO_DEVIATION * float(np.median(np.abs(np.asarray(recent) - median)))
    return loss - median > DEVIATIONS * max(deviation, FLAT * median)


def sum_by_sample(rows: Sequence[PackedRow], token_losses: Tensor) -> NDArray[np.float64]:
    """Return the summed loss and the number of target tokens of each sample of some rows, as (2, S).

    `token_losses` are the (N,) losses of all target tokens, row by row.
    """
    losses = token_losses.detach().double().cpu().numpy()
    parts, start = [], 0
    for row in rows:
        sample = row.samples_of_targets()
        row_losses = losses[start : start + len(sample)]
        start += len(sample)
        sums = np.bincount(sample, weights=row_losses, minlength=len(row.keys))
        parts.append(np.stack([sums, np.bincount(sample, minlength=len(row.keys))]))
    assert start == len(losses), f"{len(losses)} losses of {start} target tokens"
    return np.concatenate(parts, axis=1)
