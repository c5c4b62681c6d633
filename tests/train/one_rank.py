"""One rank of a stage without Ray: `python one_rank.py JOB.json RANK WORLD_SIZE RENDEZVOUS`."""

import os
import sys
from pathlib import Path

import torch

from vila_ops.train.job import Job, Place
from vila_ops.train.loop import train

if __name__ == "__main__":
    job, rank, world_size, rendezvous = sys.argv[1:]
    place = Place(rank=int(rank), world_size=int(world_size))
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}  # as every launcher does; DeepSpeed asks
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=place.rank, world_size=place.world_size
    )
    train(Job.model_validate_json(Path(job).read_text()), place)
    torch.distributed.destroy_process_group()  # else gloo's threads may outlive the interpreter, which aborts it
