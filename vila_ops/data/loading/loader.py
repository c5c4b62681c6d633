"""The packed sequences (rows) of one dataset for one stage. Resuming takes one integer, the step.

Step k reads rows [k * B, (k + 1) * B) of one endless stream; `order.py` defines which samples those are. Epochs follow
each other without a gap, so a step may read the last rows of one epoch and the first of the next. Several threads may
read at the same time.
"""

import logging
import math
import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from vila_ops.artifacts.backend import AT_ONCE
from vila_ops.artifacts.disk import remove
from vila_ops.config import Stage
from vila_ops.data.loading.arrays import DamagedCache
from vila_ops.data.loading.index import Index, SampleLocation
from vila_ops.data.loading.mixture import Size, compose
from vila_ops.data.loading.order import EpochPlan, EpochRequest, epoch_plan, random_state
from vila_ops.data.loading.packing import IGNORE_INDEX, PackedRow, pack
from vila_ops.data.loading.planner import plan
from vila_ops.data.shards import read_sample

T = TypeVar("T")
STEPS = 8
"""Steps whose rows are kept, as each is read in micro-batches."""
log = logging.getLogger(__name__)


class GlobalBatch(NamedTuple):
    """The rows of a step over all ranks, or of a validation, as far as the index knows them."""

    rows: list[list[int]]
    """The samples of each row, as numbers in the index."""
    num_images: list[int]
    """The images of each row."""
    num_targets: int
    """The target tokens of all rows."""

    def share(self, rank: int, world_size: int) -> slice:
        """The rows of a rank."""
        size = len(self.rows) // world_size
        return slice(rank * size, (rank + 1) * size)


class RowLoader:
    """Reads the rows of one dataset for one stage."""

    def __init__(self, file: Callable[[str], Path], *, digest: str, stage: Stage, cache: Path) -> None:
        """`file` returns the path of a dataset's file by name, and is called once for each file.

        `cache` keeps the index and the plans of epochs as arrays; ranks of a machine and attempts share it.
        Raises ValueError if a source has no training sample or the dataset no validation sample.
        """
        self._file = file
        self._shards: dict[str, Path] = {}
        self._index_lock, self._shards_lock = threading.RLock(), threading.Lock()
        self.digest = digest
        self.stage = stage
        self.cache = cache
        self._open()

    def _open(self) -> None:
        self._index = Index(self._file, digest=self.digest, cache=self.cache)
        train = {group.source: group for group in self._index.groups if group.split == "train"}
        sizes = {name: Size(group.samples, group.tokens) for name, group in train.items()}
        self.composition = compose(self.stage.mixture, sizes)
        """The composition of an epoch."""
        per_epoch = {name: share.samples_per_epoch for name, share in self.composition.shares.items()}
        capacity = self.stage.sequence_length if self.stage.pack else None
        self._request = EpochRequest(self.digest, self.stage.seed, capacity, per_epoch)
        self._starts = [0]  # number of rows before each epoch, for the epochs so far
        self._num_rows = lru_cache(maxsize=None)(self._count_rows)
        self._epoch = lru_cache(maxsize=2)(self._plan)
        if not any(group.split == "validation" for group in self._index.groups):
            name = self.stage.mixture.name
            share = self.stage.mixture.split.validation
            raise ValueError(
                f"stage {self.stage.name!r}: mixture {name!r} has no validation sample: a hash of object names keeps "
                f"{share:.1%} for validation, which is none of so few; add records, or raise split.validation of every "
                f"mixture alike"
            )
        self._global_batch = lru_cache(maxsize=STEPS)(self._rows_of_step)
        self._held_out = lru_cache(maxsize=1)(self._validation_rows)

    def sources(self) -> list[str]:
        """The sources of all samples, validation included."""
        return sorted({group.source for group in self._index.groups})

    def num_steps(self) -> int:
        """Optimizer steps of the stage: its num_steps, or ceil(rows of its epochs / global_batch_size).

        A part of an epoch counts as that part of its rows.
        """
        if self.stage.num_steps is not None:
            return self.stage.num_steps
        epochs = Fraction(str(self.stage.epochs))  # exact: as a float, 1.1 is more than 11 tenths
        shares = [min(Fraction(1), epochs - epoch) for epoch in range(math.ceil(epochs))]
        rows = self._with_rebuilt_cache(
            lambda: sum(share * self._num_rows(epoch) for epoch, share in enumerate(shares))
        )
        return math.ceil(rows / self.stage.global_batch_size)

    def notes(self) -> tuple[str, ...]:
        """A warning if the stage counts epochs and an epoch does not fill one global batch."""
        size = self.stage.global_batch_size
        if self.stage.epochs is None or (rows := self._with_rebuilt_cache(lambda: self._num_rows(0))) >= size:
            return ()
        repeats = f"each row is read about {size / rows:.3g} times a step"
        return (f"an epoch has {rows} rows, fewer than the global batch of {size}: {repeats}; lower it",)

    def batch(self, step: int, *, rank: int = 0, world_size: int = 1) -> tuple[list[PackedRow], int]:
        """This rank's rows of the global batch of a step, and the number of targets in the whole global batch."""
        whole = self.global_batch(step)
        return self.read(whole.rows[whole.share(rank, world_size)]), whole.num_targets

    def global_batch(self, step: int) -> GlobalBatch:
        """The rows of a step over all ranks; no sample is read."""
        return self._with_rebuilt_cache(lambda: self._global_batch(step))

    def held_out(self) -> GlobalBatch:
        """The rows of the validation split, the same for every validation; no sample is read."""
        return self._with_rebuilt_cache(lambda: self._held_out())

    def read(self, rows: Sequence[Sequence[int]]) -> list[PackedRow]:
        """Read and pack the samples of some rows. Raises CorruptShard, which names the sample."""
        locations = self._with_rebuilt_cache(lambda: [[self._index.location(number) for number in row] for row in rows])
        self._open_shards({at.shard for row in locations for at in row})
        return [self._pack(row) for row in locations]

    def keys(self, step: int) -> list[tuple[str, ...]]:
        """The keys of the samples in each row of the global batch of a step; no sample is read."""
        return self._with_rebuilt_cache(
            lambda: [tuple(self._index.location(number).key for number in row) for row in self._global_batch(step).rows]
        )

    def _with_rebuilt_cache(self, read: Callable[[], T]) -> T:
        """The result of `read`; each cache that proves to be damaged is rebuilt once, and it is read again."""
        rebuilt: set[Path] = set()
        with self._index_lock:
            while True:
                try:
                    return read()
                except DamagedCache as error:
                    if error.folder in rebuilt:
                        raise
                    log.warning("%s; it is rebuilt", error)
                    rebuilt.add(error.folder)
                    remove(str(error.folder))
                    self._open()

    def _rows_of_step(self, step: int) -> GlobalBatch:
        size = self.stage.global_batch_size
        return self._counted([self._row(number) for number in range(step * size, (step + 1) * size)])

    def _counted(self, rows: list[list[int]]) -> GlobalBatch:
        numbers = np.fromiter((number for row in rows for number in row), np.int64)
        ends = np.cumsum([len(row) for row in rows])
        images = np.concatenate([[0], np.cumsum(self._index.num_images(numbers))])
        num_images = np.diff(images[np.concatenate([[0], ends])]).tolist()
        return GlobalBatch(rows, num_images, int(self._index.num_targets(numbers).sum()))

    def _row(self, number: int) -> list[int]:
        while self._starts[-1] <= number:
            self._starts.append(self._starts[-1] + self._num_rows(len(self._starts) - 1))
        epoch = bisect_right(self._starts, number) - 1
        samples: list[int] = self._epoch(epoch).row(number - self._starts[epoch]).tolist()
        return samples

    def _count_rows(self, epoch: int) -> int:
        """Number of rows of an epoch; with packing, the epoch must be planned to know it."""
        return len(self._epoch(epoch)) if self.stage.pack else sum(self._request.samples_per_epoch.values())

    def _plan(self, epoch: int) -> EpochPlan:
        return epoch_plan(self._request, epoch, index=self._index, cache=self.cache)

    def _validation_rows(self) -> GlobalBatch:
        groups = [self._index.numbers(group) for group in self._index.groups if group.split == "validation"]
        held_out = np.concatenate(groups)
        seed = random_state(self.digest, seed=0, number=0, name="validation")
        np.random.default_rng(seed).shuffle(held_out)
        capacity, num_rows = self.stage.sequence_length, self.stage.validation_rows
        if not self.stage.pack:
            return self._counted([[number] for number in held_out[:num_rows].tolist()])
        lengths = self._index.num_tokens()[held_out]
        enough = int(np.searchsorted(np.cumsum(lengths, dtype=np.int64), num_rows * capacity)) + 1
        packing = plan(lengths[:enough], capacity=capacity, seed=seed)
        return self._counted([held_out[packing.row(row)].tolist() for row in range(min(len(packing), num_rows))])

    def _open_shards(self, shards: set[str]) -> None:
        """Verify the shards that were not read yet."""
        if shards <= self._shards.keys():
            return
        with self._shards_lock:
            fresh = sorted(shards - self._shards.keys())
            with ThreadPoolExecutor(AT_ONCE) as pool:  # each is read completely to verify its sha256
                self._shards.update(zip(fresh, pool.map(self._file, fresh), strict=True))

    def _pack(self, locations: list[SampleLocation]) -> PackedRow:
        shards = [self._shards[at.shard] for at in locations]
        samples = [
            read_sample(path.parent, shard=path.name, offset=at.offset, key=at.key)
            for path, at in zip(shards, locations, strict=True)
        ]
        most = self.stage.sequence_length
        return pack(samples, capacity=most if self.stage.pack else min(most, len(samples[0].input_ids)))


def stack(rows: list[PackedRow]) -> tuple[NDArray[np.int64], ...]:
    """(B, T) arrays of B rows, padded to the longest: input_ids, position_ids, segment_ids, labels."""
    padding = {"input_ids": 0, "position_ids": 0, "segment_ids": 0, "labels": IGNORE_INDEX}
    return tuple(_padded([getattr(row, field) for row in rows], fill=fill) for field, fill in padding.items())


def _padded(arrays: list[NDArray[np.int64]], *, fill: int) -> NDArray[np.int64]:
    whole = np.full((len(arrays), max(map(len, arrays))), fill, np.int64)
    for row, array in zip(whole, arrays, strict=True):
        row[: len(array)] = array
    return whole
