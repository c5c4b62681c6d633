"""Which samples every step really read, written down by each rank before it computes with them.

SCRATCH/samples/<address>/<attempt>-rank-00000-of-00002.jsonl

A line for each micro-batch: {"step": steps done before, "rows": keys of the samples in each row}; null for each start.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from vila_ops.data.loading.packing import PackedRow
from vila_ops.train.job import TrainJob

Keys = tuple[str, ...]
"""Of the samples in one row."""


class Read(NamedTuple):
    """What one rank read for one step; less than its share where it was killed meanwhile."""

    attempt: str
    rank: int
    world_size: int
    step: int
    """Steps done before."""
    rows: tuple[Keys, ...]


class SampleLog:
    """Of one rank."""

    def __init__(self, job: TrainJob) -> None:
        ranks = torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if ranks else 0
        world_size = torch.distributed.get_world_size() if ranks else 1
        folder = job.samples()
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / f"{Path(job.attempt).name}-rank-{rank:05d}-of-{world_size:05d}.jsonl"
        self._write(None)

    def write(self, step: int, rows: list[PackedRow]) -> None:
        """A micro-batch after `step` steps. The kernel has it at once, where a kill of this process does not reach."""
        self._write({"step": step, "rows": [row.keys for row in rows]})

    def _write(self, told: object) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps(told) + "\n")


def read_samples(folder: Path) -> list[Read]:
    """Everything that was written down, in order of time for each rank; nothing where no rank did."""
    found: list[Read] = []
    for path in sorted(folder.glob("*.jsonl")):
        attempt, rank, world_size = path.stem.replace("-rank-", "-of-").rsplit("-of-", 2)
        steps: list[tuple[int, list[Keys]]] = []
        last = None
        for line in path.read_text().splitlines(keepends=True):
            told = json.loads(line) if line.endswith("\n") else None  # killed while it wrote
            if told is not None and told["step"] != last:
                steps.append((told["step"], []))
            if told is not None:
                steps[-1][1].extend(map(tuple, told["rows"]))
            last = told and told["step"]
        found += [Read(attempt, int(rank), int(world_size), step, tuple(rows)) for step, rows in steps]
    return found


def batches_of(reads: Iterable[Read]) -> dict[int, tuple[Keys, ...]]:
    """The global batch of every step, of ranks that nobody broke off."""
    found: dict[int, tuple[Keys, ...]] = {}
    for read in sorted(reads, key=lambda read: (read.step, read.rank)):
        found[read.step] = (*found.get(read.step, ()), *read.rows)
    return found


def first_stray(reads: Iterable[Read], batches: dict[int, tuple[Keys, ...]]) -> Read | None:
    """What was read first that is not the rank's share of these global batches, or the beginning of it."""
    for read in sorted(reads, key=lambda read: read.step):
        batch = batches.get(read.step, ())
        share = len(batch) // read.world_size
        own = batch[read.rank * share : (read.rank + 1) * share]
        if read.rows != own[: len(read.rows)]:
            return read
    return None
