"""Tasks one after another in the same process: `python ranks.py TASKS.json RANK WORLD_SIZE RENDEZVOUS`.

TASKS are `alone`, of rank 0 before it joins the others, and `together`; each is the name of a module here and what
its `run` is given. Importing DeepSpeed costs more than a small stage, so that many share one process.
"""

import importlib
import json
import sys
from pathlib import Path

import torch
from process_group import end, join

from vila_ops.train.job import RankInfo

if __name__ == "__main__":
    told, rank, world_size, rendezvous = sys.argv[1:]
    tasks = json.loads(Path(told).read_text())
    torch.set_num_threads(1)
    for module, task in tasks["alone"] if rank == "0" else []:
        importlib.import_module(module).run(task, RankInfo())
    join(int(rank), int(world_size), rendezvous)
    for module, task in tasks["together"]:
        importlib.import_module(module).run(task, RankInfo(rank=int(rank), world_size=int(world_size)))
    end()
