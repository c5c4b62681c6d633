"""One rank of a stage without Ray: `python one_rank.py JOB.json RANK WORLD_SIZE RENDEZVOUS`."""

import sys
from pathlib import Path

from process_group import joined

from vila_ops.train.job import RankInfo, TrainJob
from vila_ops.train.loop import train


def main(job: str, rank: str, world_size: str, rendezvous: str) -> None:
    """Train as one rank, and end the process."""
    with joined(int(rank), int(world_size), rendezvous):
        rank_info = RankInfo(rank=int(rank), world_size=int(world_size))
        train(TrainJob.model_validate_json(Path(job).read_text()), rank_info)


if __name__ == "__main__":
    main(*sys.argv[1:])
