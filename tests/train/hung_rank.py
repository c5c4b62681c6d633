"""A rank as of one_rank.py, but rank 1 hangs while it builds its first batch: `python hung_rank.py ...`."""

import sys
import time
from pathlib import Path
from typing import Any

from process_group import end, join

from vila_ops.train import loop
from vila_ops.train.batch_builder import BatchBuilder
from vila_ops.train.job import RankInfo, TrainJob


def sleeps_for_ever() -> None:
    time.sleep(3600)


class Stuck(BatchBuilder):
    """Hangs in the first training step."""

    def __call__(self, rows: Any, *, step: int | None = None) -> Any:
        if step is not None:
            sleeps_for_ever()
        return super().__call__(rows, step=step)


if __name__ == "__main__":
    job, rank, world_size, rendezvous = sys.argv[1:]
    rank_info = RankInfo(rank=int(rank), world_size=int(world_size))
    if rank_info.rank == 1:
        loop.BatchBuilder = Stuck  # type: ignore[misc]
    join(rank_info.rank, rank_info.world_size, rendezvous)
    loop.train(TrainJob.model_validate_json(Path(job).read_text()), rank_info)
    end()
