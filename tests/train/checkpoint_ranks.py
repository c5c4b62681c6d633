"""Two ranks that save checkpoints: `checkpoint_ranks.py FOLDER RANK 2 RENDEZVOUS`. Rank 1 kills itself.

Each rank writes its results to FOLDER/result-RANK.json.
"""

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from process_group import join

from vila_ops.config import Resources
from vila_ops.train.checkpoint.checkpointer import Checkpointer
from vila_ops.train.job import RankInfo

NAMES = ("model.a.weight", "model.b/odd.weight")
KINDS = ("param", "exp_avg", "exp_avg_sq")
TRAIN = {"num_workers": 2, "network": {"timeout_seconds": 60}}
RESOURCES = {"launch": "ray", "ray_address": "127.0.0.1:1", "train": TRAIN}


def make(resume: Path, rank: int) -> Checkpointer:
    """Return the checkpointer of a new attempt."""
    resources = Resources.model_validate({**RESOURCES, "storage": {"store": str(resume.parent)}})
    return Checkpointer(str(resume), RankInfo(rank=rank, world_size=2), resources, live=True)


def save(checkpoints: Checkpointer, step: int) -> None:
    """Save and wait for the end of the save."""
    states = {name: {key: torch.full((2, 3), float(step + n)) for n, key in enumerate(KINDS)} for name in NAMES}
    checkpoints.save(step, iter(states.items()), [])
    checkpoints.close()


def newest_step(resume: Path, rank: int) -> int | None:
    """Return the step of the newest intact checkpoint."""
    newest = make(resume, rank).newest()
    return None if newest is None else newest[1]["step"]


def main(folder: Path, rank: int, rendezvous: str) -> None:
    """Save, resume, and fail."""
    results: dict[str, Any] = {}
    join(rank, 2, rendezvous)
    for step in (2, 4):
        save(make(folder / "whole", rank), step)
    results["newest"] = newest_step(folder / "whole", rank)

    open_file = Path.open

    def damaged(path: Path, *mode: Any, **more: Any) -> Any:
        """Read another file than was written, as on a damaged disk of rank 1."""
        other = path.parent.with_name("step-000002") / path.name if "step-000004" in path.parent.name else path
        return open_file(other, *mode, **more)

    if rank == 1:
        Path.open = damaged  # type: ignore[method-assign]
    results["newest with damage"] = newest_step(folder / "whole", rank)
    Path.open = open_file  # type: ignore[method-assign]

    save(make(folder / "broken", rank), 2)
    full = make(folder / "broken", rank)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, most))
    try:
        save(full, 6)
    except OSError as error:
        results["failed"] = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    (folder / f"result-{rank}.json").write_text(json.dumps(results))

    dying = make(folder / "broken", rank)
    if rank == 1:
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
    try:
        save(dying, 8)
    except RuntimeError as error:
        results["died"] = repr(error)
    (folder / f"result-{rank}.json").write_text(json.dumps(results))
    os._exit(0)  # a normal exit may abort in gloo's threads


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[4])
