"""How fast a stage's steps are and what came of them: to MLflow, and as a line for who watches.

loss, loss/SOURCE                         nats per target token of the step, of all rows and of each source's
validation_loss, validation_loss/SOURCE   the same of the validation rows, where there was one
grad_norm, learning_rate/PART             before clipping; of the parts that train
seconds_per_step                          from one step's end to the next's, with waits and checkpoints, not validation
train/tokens_per_s                        tokens that are not padding, of all ranks
train/target_tokens_per_s                 those of them that are predicted
train/padding_fraction                    of the positions that were computed; the rest are useful tokens
train/mfu                                 model FLOPs by the rule of `plan/flops.py` a second / peak of all accelerators
train/cost                                of all accelerators since this attempt began its first step
data/wait_fraction                        of the step, in which the loop waited for batches; mean over ranks
ckpt/stall_s                              of the step, in which the loop waited for checkpoints; rank 0
memory/peak_gpu_gib, memory/peak_rss_gib  so far, of rank 0: torch's allocator, or the process where there is no GPU
"""

import logging
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vila_ops.data.loading.packing import PackedRow
from vila_ops.model.vila import VilaForConditionalGeneration
from vila_ops.plan.flops import training_flops
from vila_ops.plan.shapes import Shapes, shapes_of
from vila_ops.tracking import MetricLog
from vila_ops.train.batch_builder import BatchBuilder
from vila_ops.train.job import TrainJob
from vila_ops.train.objective import Batch

log = logging.getLogger(__name__)

LINES = 20
"""Progress lines of a stage, at most, where none can be rewritten."""
REWRITE_SECONDS = 0.2
"""Between two states of a line that can."""


class StepMetrics(NamedTuple):
    """What all ranks together saw of a step, or of a validation."""

    loss: float
    """Sum of the losses that were added."""
    by_source: dict[str, float]
    """Mean loss in nats per target token, of the sources that had any."""
    targets: float
    tokens: float
    """Padding not."""
    positions: float
    """Padding too."""
    flops: float
    waited: float
    """Seconds for batches, mean over ranks."""


class LossAccumulator:
    """Of one rank: what it saw since the last reading. Losses stay on their device until then: a GPU waits once."""

    def __init__(
        self, job: TrainJob, model: VilaForConditionalGeneration, batches: BatchBuilder, sources: Sequence[str]
    ) -> None:
        """`sources` are the same on every rank."""
        self.stage, self.sources, self.batches = job.stage, list(sources), batches
        self.shapes = _shapes(model) if job.resources.train.accelerator else None
        self._number = {source: number for number, source in enumerate(sources)}
        self._passed = batches.cache.passed
        self._clear()

    def _clear(self) -> None:
        size = len(self.sources)
        self._losses = torch.zeros(1 + size, dtype=torch.float64, device=self.batches.device)  # of all, of each source
        self._targets = np.zeros(size)
        self._tokens = self._positions = self._flops = self._waited = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The time in here is spent waiting for batches."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def batch(self, rows: list[PackedRow], *, step: int | None = None) -> Batch:
        """See Batches; the loop waits for it."""
        with self.waiting():
            return self.batches(rows, step=step)

    def add(self, rows: Sequence[PackedRow], loss: Tensor, each: Tensor) -> None:
        """A micro-batch with its loss, and the losses (N,) of its targets, row by row."""
        of_rows = [self._sources_of_targets(row) for row in rows]
        numbers = np.concatenate(of_rows)
        index = torch.from_numpy(numbers)
        if each.is_cuda:
            index = index.pin_memory()  # else the copy waits for what the GPU has still to do
        self._losses[0] += loss.detach()
        self._losses[1:].index_add_(0, index.to(each.device, non_blocking=True), each.double())
        self._targets += np.bincount(numbers, minlength=len(self.sources))
        self._tokens += sum(np.count_nonzero(row.segment_ids) for row in rows)
        self._positions += len(rows) * max(len(row.segment_ids) for row in rows)
        if self.shapes is not None:
            for row, own in zip(rows, of_rows, strict=True):
                self._flops += self._flops_of(self.shapes, row, targets=len(own))

    def read(self) -> StepMetrics:
        """What was added on all ranks, every one of which must ask; the next reading starts anew."""
        passed, self._passed = self.batches.cache.passed - self._passed, self.batches.cache.passed
        if self.shapes is not None:
            self._flops += passed * self._flops_of_tower(self.shapes)
        counts = [self._tokens, self._positions, self._flops, self._waited, 1.0, *self._targets.tolist()]
        whole = torch.cat([torch.tensor(counts, dtype=torch.float64, device=self._losses.device), self._losses])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(whole)
        tokens, positions, flops, waited, ranks, *rest = whole.tolist()
        size = len(self.sources)
        targets, loss, losses = rest[:size], rest[size], rest[size + 1 :]
        self._clear()
        by_source = {s: total / n for s, total, n in zip(self.sources, losses, targets, strict=True) if n}
        return StepMetrics(loss, by_source, sum(targets), tokens, positions, flops, waited / ranks)

    def _sources_of_targets(self, row: PackedRow) -> NDArray[np.int64]:
        """(N,) the number of each target's source."""
        of_sample = np.array([self._number[source] for source in row.sources], np.int64)
        return of_sample[row.samples_of_targets()]

    def _flops_of(self, shapes: Shapes, row: PackedRow, *, targets: int) -> float:
        """A frozen tower's not: they are counted in the step in which it ran."""
        lengths = np.bincount(row.segment_ids)[1:].tolist()
        return training_flops(
            shapes, self.stage, segments=lengths, images=len(row.images), targets=targets, features_cached=True
        )

    def _flops_of_tower(self, shapes: Shapes) -> float:
        """Of a frozen one, for one image."""
        ran, cached = (
            training_flops(shapes, self.stage, segments=[], images=1, targets=0, features_cached=known)
            for known in (False, True)
        )
        return ran - cached


class MetricsLogger:
    """Of rank 0, from its making on: the time before the first step is not counted."""

    def __init__(self, job: TrainJob, metrics: MetricLog, *, step: int, num_steps: int) -> None:
        """`step` of `num_steps` are done already."""
        self.stage, self.resources, self.metrics = job.stage, job.resources, metrics
        self.first, self.num_steps = step, num_steps
        self.metrics.log({"num_steps": num_steps}, step=step)
        self.on_gpu = bool(job.resources.train.gpus_per_worker)
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()  # of a stage before it in this process
        self.live = sys.stderr.isatty()
        self.stalled = 0.0
        self.shown = float("-inf")
        self.started = self.last = time.monotonic()

    def count(self, step: int, seen: StepMetrics, *, norm: float, factor: float, stalled: float) -> None:
        """A step was taken: what came of it, its gradient's norm, its share of the peak rates.

        `stalled` are the seconds that the loop has waited for checkpoints so far.
        """
        now = time.monotonic()
        seconds, self.last = now - self.last, now
        stall, self.stalled = stalled - self.stalled, stalled
        values = {
            "loss": seen.loss,
            **{f"loss/{source}": loss for source, loss in seen.by_source.items()},
            "grad_norm": norm,
            **{f"learning_rate/{part}": self.stage.peak_rate(part) * factor for part in self.stage.trainable},
            "seconds_per_step": seconds,
            "train/tokens_per_s": seen.tokens / seconds,
            "train/target_tokens_per_s": seen.targets / seconds,
            "train/padding_fraction": 1 - seen.tokens / seen.positions,
            "data/wait_fraction": seen.waited / seconds,
            "ckpt/stall_s": stall,
            **peak_memory(on_gpu=self.on_gpu),
        }
        if (accelerator := self.resources.train.accelerator) is not None:
            number = self.resources.train.num_workers
            if seen.flops:
                values["train/mfu"] = seen.flops / seconds / (accelerator.peak_tflops * 1e12 * number)
            values["train/cost"] = accelerator.price_per_hour * number * (now - self.started) / 3600
        self.metrics.log(values, step=step)
        self._show(step, values)

    def validated(self, step: int, seen: StepMetrics) -> None:
        """A validation is over; its time is no step's."""
        by_source = {f"validation_loss/{source}": mean for source, mean in seen.by_source.items()}
        self.metrics.log({"validation_loss": seen.loss, **by_source}, step=step)
        self.last = time.monotonic()

    def _show(self, step: int, values: dict[str, float]) -> None:
        """One line that is rewritten in place on a terminal, else now and then a line in the log."""
        if self.live:
            if self.last - self.shown >= REWRITE_SECONDS or step == self.num_steps:
                self.shown = self.last
                line = self._line(step, values)[: shutil.get_terminal_size().columns - 1]
                sys.stderr.write(f"\r{line}\x1b[K" + "\n" * (step == self.num_steps))
                sys.stderr.flush()
        elif step in (1, self.num_steps) or step % -(-self.num_steps // (LINES - 2)) == 0:
            log.info("%s", self._line(step, values))

    def _line(self, step: int, values: dict[str, float]) -> str:
        useful = 100 * (1 - values["train/padding_fraction"])
        told = [
            f"{self.stage.name} step {step}/{self.num_steps}",
            f"loss {values['loss']:.3f}",
            f"{values['train/tokens_per_s']:,.0f} tokens/s",
            f"{useful:.0f} % useful",
        ]
        if "train/mfu" in values:
            told.append(f"MFU {100 * values['train/mfu']:.0f} %")
        return "  ".join([*told, self._left(step)])

    def _left(self, step: int) -> str:
        """Time left at the mean pace so far."""
        pace = (self.last - self.started) / max(1, step - self.first)
        seconds = round(pace * (self.num_steps - step))
        return f"{seconds // 60}:{seconds % 60:02d} left"


def peak_memory(*, on_gpu: bool) -> dict[str, float]:
    """In GiB so far, by the name of what is measured; asks no GPU."""
    if on_gpu:
        return {"memory/peak_gpu_gib": torch.cuda.max_memory_allocated() / 2**30}
    unit = 1 if sys.platform == "darwin" else 2**10  # of ru_maxrss, in bytes
    return {"memory/peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}


def _shapes(model: VilaForConditionalGeneration) -> Shapes | None:
    try:
        return shapes_of(model.config)
    except ValueError as error:
        log.warning("no MFU is told: %s", error)
        return None
