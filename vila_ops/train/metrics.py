"""Metrics of a stage's steps: collected on every rank, logged to MLflow and told as progress by rank 0.

loss, loss/SOURCE                         nats per target token of the step, over all rows and over each source
validation_loss, validation_loss/SOURCE   the same over the validation rows, at steps with a validation
grad_norm, learning_rate/PART             gradient norm before clipping; learning rate of each part that trains
seconds_per_step                          from the end of a step to the next, with waits and saves, without validation
train/tokens_per_s                        tokens of all ranks, without padding
train/target_tokens_per_s                 target tokens of all ranks
train/padding_fraction                    share of the computed positions that is padding
train/mfu                                 model FLOPs (rule: `plan/flops.py`) per second / peak of all accelerators
train/cost                                price of all accelerators since this attempt began its first step
data/wait_fraction                        share of the step that the loop waited for batches, mean over ranks
ckpt/stall_s                              seconds of the step that the loop of rank 0 waited for checkpoints
memory/peak_gpu_gib, memory/peak_rss_gib  peak so far on rank 0: of torch's allocator, or of the process without a GPU
"""

import logging
import resource
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vila_ops import tracing
from vila_ops.data.loading.packing import PackedRow
from vila_ops.device import on_accelerator, peak_bytes, reset_peak_bytes
from vila_ops.model.vila import VilaForConditionalGeneration
from vila_ops.plan.flops import training_flops
from vila_ops.plan.shapes import Shapes, shapes_of
from vila_ops.progress import Progress
from vila_ops.tracking import MetricLog
from vila_ops.train.batch_builder import BatchBuilder
from vila_ops.train.job import TrainJob
from vila_ops.train.progress import FIRST_AT, FIRST_STEP, NUM_STEPS

log = logging.getLogger(__name__)


class StepMetrics(NamedTuple):
    """Totals over all ranks of a step, or of a validation."""

    loss: float
    """Sum of the losses that were added."""
    source_losses: dict[str, float]
    """Mean loss in nats per target token of each source that had target tokens."""
    targets: float
    """Number of target tokens."""
    tokens: float
    """Number of tokens without padding."""
    positions: float
    """Number of positions, padding included."""
    flops: float
    wait_seconds: float
    """Time that the loop waited for batches, mean over ranks."""
    grad_norm: float = 0.0
    """Gradient norm before clipping; 0 in a validation."""


class LossAccumulator:
    """Adds up losses and counts of one rank's micro-batches. Losses stay on their device until `reduce`."""

    def __init__(
        self, job: TrainJob, model: VilaForConditionalGeneration, batch_builder: BatchBuilder, sources: Sequence[str]
    ) -> None:
        """`sources` must be the same on every rank."""
        self.stage, self.sources, self.batch_builder = job.stage, list(sources), batch_builder
        self.shapes = _shapes(model) if job.resources.train.accelerator else None
        self._number = {source: number for number, source in enumerate(sources)}
        self._tower_images = batch_builder.feature_cache.num_computed
        self._reset()

    def _reset(self) -> None:
        size = len(self.sources)
        self._losses = torch.zeros(1 + size, dtype=torch.float64, device=self.batch_builder.device)  # all, each source
        self._targets = np.zeros(size)
        self._tokens = self._positions = self._flops = self._wait_seconds = 0.0

    def add(self, rows: Sequence[PackedRow], loss: Tensor, token_losses: Tensor, *, wait_seconds: float = 0.0) -> None:
        """Add a micro-batch: its loss, its (N,) token losses, row by row, and how long the loop waited for it."""
        self._wait_seconds += wait_seconds
        row_sources = [self._sources_of_targets(row) for row in rows]
        numbers = np.concatenate(row_sources)
        self._losses[0] += loss.detach()
        self._losses[1:].index_add_(0, self._sent(torch.from_numpy(numbers)), token_losses.double())
        self._targets += np.bincount(numbers, minlength=len(self.sources))
        self._tokens += sum(np.count_nonzero(row.segment_ids) for row in rows)
        self._positions += len(rows) * max(len(row.segment_ids) for row in rows)
        if self.shapes is not None:
            for row, targets in zip(rows, row_sources, strict=True):
                self._flops += self._row_flops(self.shapes, row, targets=len(targets))

    def reduce(self, grad_norm: Tensor | None = None) -> StepMetrics:
        """Return the totals over all ranks and start again at zero. All ranks must call this.

        The gradient norm (), which all ranks share, is read with them, so that the host waits for the device once.
        """
        images_before, self._tower_images = self._tower_images, self.batch_builder.feature_cache.num_computed
        if self.shapes is not None:
            self._flops += (self._tower_images - images_before) * self._tower_flops(self.shapes)
        counts = [self._tokens, self._positions, self._flops, self._wait_seconds, 1.0, *self._targets.tolist()]
        totals = torch.cat([self._sent(torch.tensor(counts, dtype=torch.float64)), self._losses])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(totals)
        norm = totals.new_zeros(1) if grad_norm is None else grad_norm.to(totals).view(1)
        tokens, positions, flops, wait_seconds, ranks, *rest, norm_read = torch.cat([totals, norm]).tolist()
        size = len(self.sources)
        targets, loss, losses = rest[:size], rest[size], rest[size + 1 :]
        self._reset()
        source_losses = {s: total / n for s, total, n in zip(self.sources, losses, targets, strict=True) if n}
        return StepMetrics(loss, source_losses, sum(targets), tokens, positions, flops, wait_seconds / ranks, norm_read)

    def _sent(self, values: Tensor) -> Tensor:
        """Return values of the host on the device. A copy from pageable memory would wait for the device's queue."""
        pinned = values.pin_memory() if on_accelerator(self._losses) else values
        return pinned.to(self._losses.device, non_blocking=True)

    def _sources_of_targets(self, row: PackedRow) -> NDArray[np.int64]:
        """Return the number of each target token's source, as (N,)."""
        of_sample = np.array([self._number[source] for source in row.sources], np.int64)
        return of_sample[row.samples_of_targets()]

    def _row_flops(self, shapes: Shapes, row: PackedRow, *, targets: int) -> float:
        """Return the model FLOPs of a row. A frozen tower's are counted separately, in the step in which it ran."""
        lengths = np.bincount(row.segment_ids)[1:].tolist()
        return training_flops(
            shapes, self.stage, segments=lengths, images=len(row.images), targets=targets, features_cached=True
        )

    def _tower_flops(self, shapes: Shapes) -> float:
        """Return the FLOPs of a frozen tower for one image."""
        with_tower, without = (
            training_flops(shapes, self.stage, segments=[], images=1, targets=0, features_cached=cached)
            for cached in (False, True)
        )
        return with_tower - without


class MetricsLogger:
    """Logs the metrics of steps and validations on rank 0. Its clock starts when it is created."""

    def __init__(self, job: TrainJob, metrics: MetricLog, device: torch.device, *, step: int, num_steps: int) -> None:
        """`step` of `num_steps` steps are already done."""
        self.stage, self.resources, self.metrics = job.stage, job.resources, metrics
        self.metrics.log_once({"num_steps": num_steps}, step=step)
        self.newest: dict[str, float] = {NUM_STEPS: num_steps, FIRST_STEP: step, FIRST_AT: time.time()}
        """The last value of each metric."""
        self.device = device
        reset_peak_bytes(device)  # drops the peak of an earlier stage in this process
        self.progress = Progress(job.stage.name, num_steps, unit="step", done=step)
        self.stall_seconds = 0.0
        self.started = self.last = time.monotonic()

    def log_step(self, step: int, totals: StepMetrics, *, lr_multiplier: float, stall_seconds: float) -> None:
        """Log the metrics after `step` steps.

        `lr_multiplier` is the share of the peak rates, and `stall_seconds` the time that the loop has waited for
        checkpoints so far.
        """
        now = time.monotonic()
        seconds, self.last = now - self.last, now
        stall, self.stall_seconds = stall_seconds - self.stall_seconds, stall_seconds
        values = {
            "loss": totals.loss,
            **{f"loss/{source}": loss for source, loss in totals.source_losses.items()},
            "grad_norm": totals.grad_norm,
            **{f"learning_rate/{part}": self.stage.peak_rate(part) * lr_multiplier for part in self.stage.trainable},
            "seconds_per_step": seconds,
            "train/tokens_per_s": totals.tokens / seconds,
            "train/target_tokens_per_s": totals.targets / seconds,
            "train/padding_fraction": 1 - totals.tokens / totals.positions,
            "data/wait_fraction": totals.wait_seconds / seconds,
            "ckpt/stall_s": stall,
            **peak_memory(self.device),
        }
        if (accelerator := self.resources.train.accelerator) is not None:
            number = self.resources.train.num_workers
            if totals.flops:
                values["train/mfu"] = totals.flops / seconds / (accelerator.peak_tflops * 1e12 * number)
            values["train/cost"] = accelerator.price_per_hour * number * (now - self.started) / 3600
        self.metrics.log_once(values, step=step)
        self.newest = {**self.newest, **values}
        tracing.past("training step", seconds, {"vila.step": step, "vila.loss": totals.loss})
        self._show_progress(step, values)

    def log_validation(self, step: int, totals: StepMetrics) -> None:
        """Log a validation after `step` steps. Its time does not count as time of a step."""
        source_losses = {f"validation_loss/{source}": mean for source, mean in totals.source_losses.items()}
        values = {"validation_loss": totals.loss, **source_losses}
        self.metrics.log_once(values, step=step)
        self.newest = {**self.newest, **values}
        self.last = time.monotonic()

    def _show_progress(self, step: int, values: dict[str, float]) -> None:
        facts = [
            f"loss {values['loss']:.3f}",
            f"{values['train/tokens_per_s']:,.0f} tokens/s",
            f"{100 * (1 - values['train/padding_fraction']):.0f} % useful",
        ]
        if "train/mfu" in values:
            facts.append(f"MFU {100 * values['train/mfu']:.0f} %")
        self.progress.show(step, *facts)


def peak_memory(device: torch.device) -> dict[str, float]:
    """Return the peak memory so far in GiB, by metric name. It does not synchronise with the GPU."""
    if device.type != "cpu":
        return {"memory/peak_gpu_gib": peak_bytes(device) / 2**30}
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes per unit of ru_maxrss
    return {"memory/peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}


def _shapes(model: VilaForConditionalGeneration) -> Shapes | None:
    try:
        return shapes_of(model.config)
    except ValueError as error:
        log.warning("MFU is not reported: %s", error)
        return None
