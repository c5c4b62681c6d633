"""The micro-batches of one rank, in order. Threads read, decode and pack rows while the device computes.

    threads       rows from the shards -> HostBatch, with features from disk or decoded images
    this thread   copies the next HostBatch, and runs a frozen tower over images that have no features yet

Rows, batches and errors do not depend on the number of threads: a result is taken when its turn comes.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import NamedTuple, Self

from vila_ops.ahead import Ahead, Workers
from vila_ops.data.loading.loader import RowLoader
from vila_ops.data.loading.packing import PackedRow
from vila_ops.train.batch_builder import BatchBuilder, HostBatch
from vila_ops.train.job import RankInfo, TrainJob
from vila_ops.train.objective import Batch
from vila_ops.train.profile import span
from vila_ops.train.sample_log import SampleLog

DEPTH = 2
"""Micro-batches that are begun and not taken, for each thread."""


Loaded = tuple[HostBatch, int]
"""A micro-batch in the host's memory, and the target tokens of its global batch."""


class LoadedBatch(NamedTuple):
    """A micro-batch for the engine, and what the loop needs to know of it."""

    batch: Batch
    rows: list[PackedRow]
    num_targets: int
    """Target tokens of the step's global batch, over all ranks, or of the validation rows."""
    wait_seconds: float
    """How long the loop waited for it."""


class Part(NamedTuple):
    """A micro-batch of a step."""

    step: int
    start: int
    """Its first row among the rank's rows of the step."""


class BatchLoader:
    """Loads the micro-batches of one rank. Its threads end with the context."""

    def __init__(self, job: TrainJob, rank_info: RankInfo, row_loader: RowLoader, batch_builder: BatchBuilder) -> None:
        self.rank_info, self.row_loader, self.batch_builder = rank_info, row_loader, batch_builder
        train = job.resources.train
        self._size = train.micro_batch_size
        self._rows_of_rank = job.stage.global_batch_size // rank_info.world_size
        self._workers = Workers(train.loading_threads, name="loading")
        self._depth = DEPTH * train.loading_threads
        self._training: Ahead[Part, Loaded] | None = None
        self._next_step = -1
        self._sample_log = SampleLog(job) if train.record_samples else None
        self._context = ExitStack()

    def __enter__(self) -> Self:
        self._context.enter_context(self.batch_builder.feature_cache.writing_behind())
        self._context.enter_context(self._workers)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._context.__exit__(kind, error, at)

    def train(self, step: int) -> Iterator[LoadedBatch]:
        """The micro-batches of a step. Those of the steps after it are loaded ahead."""
        if self._training is None or step != self._next_step:
            if self._training is not None:
                self._training.drop()
            self._training = Ahead(self._workers, self._read, self._parts(step), depth=self._depth)
        self._next_step = -1  # until the step was taken as a whole
        for _ in range(0, self._rows_of_rank, self._size):
            micro_batch = self._take(self._training)
            if self._sample_log:
                self._sample_log.write(step, micro_batch.rows)
            yield micro_batch
        self._next_step = step + 1

    def validation(self) -> Iterator[LoadedBatch]:
        """The validation rows that this rank has, one at a time. All ranks have equally many, as ZeRO-3 needs.

        What a rank has only for that has no rows.
        """
        whole, size = self.row_loader.held_out(), self.rank_info.world_size
        passes = range(0, len(whole.rows), size)
        ahead = Ahead(self._workers, self._read_validation, passes, depth=self._depth)
        for start in passes:
            micro_batch = self._take(ahead)
            is_repeated = start + self.rank_info.rank >= len(whole.rows)
            yield micro_batch._replace(rows=[]) if is_repeated else micro_batch

    def _parts(self, step: int) -> Iterator[Part]:
        """The micro-batches from a step to the last one of the stage."""
        for later in range(step, self.row_loader.num_steps()):
            for start in range(0, self._rows_of_rank, self._size):
                yield Part(later, start)

    def _take(self, ahead: Ahead[Part, Loaded] | Ahead[int, Loaded]) -> LoadedBatch:
        """The next micro-batch, on the device. The copy of the one after it begins, if that was read."""
        waited = ahead.wait_seconds
        with span("data"):
            host, num_targets = ahead.take()
        batch = self.batch_builder.on_device(host, (later for later, _ in ahead.upcoming()))
        if ahead.is_ready():
            self.batch_builder.send(next(ahead.upcoming())[0])
        loaded = LoadedBatch(batch, host.rows, num_targets, ahead.wait_seconds - waited)
        ahead.refill()  # last, as the threads that it wakes hold up this one
        return loaded

    def _read(self, part: Part) -> Loaded:
        """Read a micro-batch; a thread runs this."""
        whole = self.row_loader.global_batch(part.step)
        size = min(self._size, self._rows_of_rank - part.start)
        starts = [rank * self._rows_of_rank + part.start for rank in range(self.rank_info.world_size)]
        own = starts[self.rank_info.rank]
        host = self.batch_builder.on_host(
            self.row_loader.read(whole.rows[own : own + size]),
            step=part.step,
            any_images=any(any(whole.num_images[start : start + size]) for start in starts),
        )
        return host, whole.num_targets

    def _read_validation(self, start: int) -> Loaded:
        """Read one validation row; a thread runs this."""
        whole = self.row_loader.held_out()
        own = min(start + self.rank_info.rank, len(whole.rows) - 1)
        any_images = any(whole.num_images[start : start + self.rank_info.world_size])
        host = self.batch_builder.on_host(self.row_loader.read([whole.rows[own]]), step=None, any_images=any_images)
        return host, whole.num_targets
