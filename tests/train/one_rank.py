"""One rank of a stage without Ray: `python one_rank.py JOB.json RANK WORLD_SIZE RENDEZVOUS`."""

import sys
from pathlib import Path

from process_group import end, join

from vila_ops.train.job import RankInfo, TrainJob
from vila_ops.train.loop import train

if __name__ == "__main__":
    job, rank, world_size, rendezvous = sys.argv[1:]
    rank_info = RankInfo(rank=int(rank), world_size=int(world_size))
    join(rank_info.rank, rank_info.world_size, rendezvous)
    train(TrainJob.model_validate_json(Path(job).read_text()), rank_info)
    end()
