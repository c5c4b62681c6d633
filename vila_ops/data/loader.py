"""The order of samples and rows: a pure function of (data digest, seed, epoch), the same for any world size.

Resuming takes one integer, the step: step k reads rows [k * B, (k + 1) * B) of one endless stream.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vila_ops.config import Stage
from vila_ops.data.packing import Row, pack, plan_rows
from vila_ops.data.shards import read_index, read_sample


@dataclass(frozen=True)
class Entry:
    """Where one sample lies."""

    key: str
    shard: str
    offset: int
    num_tokens: int
    num_targets: int


class Rows:
    """The packed rows of one dataset for one stage."""

    def __init__(self, folder: Path, *, digest: str, stage: Stage) -> None:
        """Raises ValueError when a source has no training sample or the dataset no validation sample."""
        self.folder = folder
        self.stage = stage
        self.digest = digest
        index = read_index(folder).to_pylist()
        weights = {name: source.weight for name, source in sorted(stage.mixture.sources.items())}
        self._train = {name: _entries(index, split="train", source=name) for name in weights}
        if empty := [name for name, entries in self._train.items() if not entries]:
            raise ValueError(f"stage {stage.name!r}: sources {empty} have no training sample; remove them")
        self._held_out = _entries(index, split="validation", source=None)
        if not self._held_out:
            raise ValueError(f"stage {stage.name!r}: mixture {stage.mixture.name!r} has no validation sample")
        self._per_epoch = _per_epoch({name: len(entries) for name, entries in self._train.items()}, weights)
        self._epoch = lru_cache(maxsize=2)(self._plan)
        self._num_rows: list[int] = []  # of the epochs planned so far

    def batch(self, step: int, *, rank: int = 0, world_size: int = 1) -> tuple[list[Row], int]:
        """This rank's rows of the global batch of a step, and the number of targets in the whole of it."""
        size = self.stage.global_batch_size
        rows = [self._row(number) for number in range(step * size, (step + 1) * size)]
        share = size // world_size
        own = rows[rank * share : (rank + 1) * share]
        return [self._pack(row) for row in own], sum(entry.num_targets for row in rows for entry in row)

    def validation(self) -> list[Row]:
        """The rows of the validation split that every validation reads, always the same."""
        order = np.random.default_rng(_seed(self.digest, 0, 0, "validation")).permutation(len(self._held_out))
        entries = [self._held_out[i] for i in order]
        rows = plan_rows([entry.num_tokens for entry in entries], capacity=self.stage.row_tokens)
        return [self._pack([entries[i] for i in row]) for row in rows[: self.stage.validation_rows]]

    def _row(self, number: int) -> list[Entry]:
        epoch = 0
        while True:
            if epoch == len(self._num_rows):
                self._num_rows.append(len(self._epoch(epoch)))
            if number < self._num_rows[epoch]:
                return self._epoch(epoch)[number]
            number -= self._num_rows[epoch]
            epoch += 1

    def _plan(self, epoch: int) -> list[list[Entry]]:
        drawn = [
            entries[i]
            for name, entries in self._train.items()
            for i in self._cycle(name, start=epoch * self._per_epoch[name], count=self._per_epoch[name])
        ]
        draw = np.random.default_rng(_seed(self.digest, self.stage.seed, epoch, "order"))
        drawn = [drawn[i] for i in draw.permutation(len(drawn))]
        rows = plan_rows([entry.num_tokens for entry in drawn], capacity=self.stage.row_tokens)
        return [[drawn[i] for i in rows[place]] for place in draw.permutation(len(rows))]

    def _cycle(self, name: str, *, start: int, count: int) -> list[int]:
        """`count` places of the endless stream of a source's permutations, from `start` on."""
        size = len(self._train[name])
        found: list[int] = []
        for place in range(start // size, (start + count - 1) // size + 1):
            order = np.random.default_rng(_seed(self.digest, self.stage.seed, place, name)).permutation(size)
            found += order[max(0, start - place * size) : start + count - place * size].tolist()
        return found

    def _pack(self, entries: list[Entry]) -> Row:
        samples = [read_sample(self.folder, shard=e.shard, offset=e.offset, key=e.key) for e in entries]
        return pack(samples, capacity=self.stage.row_tokens)


def stack(rows: list[Row]) -> tuple[NDArray[np.int64], ...]:
    """(B, T) arrays of some rows: input_ids, position_ids, segment_ids, labels."""
    fields = ("input_ids", "position_ids", "segment_ids", "labels")
    return tuple(np.stack([getattr(row, field) for row in rows]) for field in fields)


def _entries(index: list[dict[str, Any]], *, split: str, source: str | None) -> list[Entry]:
    return [
        Entry(row["key"], row["shard"], row["offset"], row["num_tokens"], row["num_targets"])
        for row in index
        if row["split"] == split and source in (None, row["source"])
    ]


def _per_epoch(sizes: dict[str, int], weights: dict[str, float]) -> dict[str, int]:
    """Samples of each source in one epoch: as many as there are in all, shared by weight, at least one each."""
    total, mass = sum(sizes.values()), sum(weights.values())
    return {name: max(1, round(total * weights[name] / mass)) for name in sizes}


def _seed(digest: str, seed: int, number: int, name: str) -> list[int]:
    return [int(digest[:16], 16), seed, number, *name.encode()]
