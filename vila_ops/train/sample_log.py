"""A record of the samples that every training step read; each rank writes it before it computes with them.

SCRATCH/sample_log/<address>/<attempt>-rank-00000-of-00002.jsonl

Each line is a micro-batch: {"step": steps done before, "rows": keys of the samples in each row}. A line `null` marks
the start of a process.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from vila_ops.data.loading.packing import PackedRow
from vila_ops.train.job import TrainJob

Keys = tuple[str, ...]
"""The keys of the samples in one row."""


class StepSamples(NamedTuple):
    """The rows that one rank read for one step: its share of the global batch, or less if it was killed."""

    attempt: str
    rank: int
    world_size: int
    step: int
    """Number of steps done before."""
    rows: tuple[Keys, ...]


class SampleLog:
    """Records the samples that this rank reads."""

    def __init__(self, job: TrainJob) -> None:
        distributed = torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if distributed else 0
        world_size = torch.distributed.get_world_size() if distributed else 1
        folder = job.sample_log()
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / f"{Path(job.attempt).name}-rank-{rank:05d}-of-{world_size:05d}.jsonl"
        self._append(None)

    def write(self, step: int, rows: list[PackedRow]) -> None:
        """Record a micro-batch. The kernel has it when this returns, so a kill of this process does not lose it."""
        self._append({"step": step, "rows": [row.keys for row in rows]})

    def _append(self, entry: object) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def read_sample_log(folder: Path) -> list[StepSamples]:
    """Return every step of a stage's sample log, in order of time for each rank; empty if no rank recorded any."""
    recorded: list[StepSamples] = []
    for path in sorted(folder.glob("*.jsonl")):
        attempt, rank, world_size = path.stem.replace("-rank-", "-of-").rsplit("-of-", 2)
        steps: list[tuple[int, list[Keys]]] = []
        last_step = None
        for line in path.read_text().splitlines(keepends=True):
            entry = json.loads(line) if line.endswith("\n") else None  # a line cut off by a kill is not read
            if entry is not None and entry["step"] != last_step:
                steps.append((entry["step"], []))
            if entry is not None:
                steps[-1][1].extend(map(tuple, entry["rows"]))
            last_step = entry and entry["step"]
        recorded += [StepSamples(attempt, int(rank), int(world_size), step, tuple(rows)) for step, rows in steps]
    return recorded


def global_batches(recorded: Iterable[StepSamples]) -> dict[int, tuple[Keys, ...]]:
    """Return the rows of the global batch of every step, from ranks that were not interrupted."""
    batches: dict[int, tuple[Keys, ...]] = {}
    for one in sorted(recorded, key=lambda one: (one.step, one.rank)):
        batches[one.step] = (*batches.get(one.step, ()), *one.rows)
    return batches


def first_mismatch(recorded: Iterable[StepSamples], batches: dict[int, tuple[Keys, ...]]) -> StepSamples | None:
    """Return the first record that is not the rank's share of these global batches, or the beginning of that share."""
    for one in sorted(recorded, key=lambda one: one.step):
        batch = batches.get(one.step, ())
        size = len(batch) // one.world_size
        share = batch[one.rank * size : (one.rank + 1) * size]
        if one.rows != share[: len(one.rows)]:
            return one
    return None
