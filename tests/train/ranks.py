"""Several tasks in one process per rank: `python ranks.py TASKS.json RANK WORLD_SIZE RENDEZVOUS`.

TASKS has the lists `alone`, for rank 0 before it joins the process group, and `together`. A task is the name of a
module in this folder and the argument of its `run`. Importing DeepSpeed takes longer than a small stage, so many stages
share one process.
"""

import importlib
import json
import sys
from pathlib import Path

import torch
from process_group import joined

from vila_ops.train.job import RankInfo

if __name__ == "__main__":
    tasks_file, rank, world_size, rendezvous = sys.argv[1:]
    tasks = json.loads(Path(tasks_file).read_text())
    torch.set_num_threads(1)
    for module, task in tasks["alone"] if rank == "0" else []:
        importlib.import_module(module).run(task, RankInfo())
    with joined(int(rank), int(world_size), rendezvous):
        for module, task in tasks["together"]:
            importlib.import_module(module).run(task, RankInfo(rank=int(rank), world_size=int(world_size)))
