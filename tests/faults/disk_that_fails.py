"""Saves on a disk that fails: `LD_PRELOAD=faulty_disk.so python disk_that_fails.py FOLDER COUNT SEED`.

Says as JSON of every case its fault, what was raised, and which step was the newest whole one before, after the fault,
and once the disk was well again.
"""

import ctypes
import errno
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from vila_ops.config import Resources
from vila_ops.train.checkpoint.checkpointer import Checkpointer
from vila_ops.train.job import RankInfo

CALLS = {"open": 2, "write": 5, "fsync": 4, "mkdir": 1, "rename": 2, "read": 3}
"""What a save (or, of `read`, a resume) calls, and how often at least."""
ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT)


def save(folder: Path, step: int) -> None:
    """One save to its end."""
    checkpoints = attempt(folder)
    states = {name: {kind: torch.full((100, 500), float(step)) for kind in ("param", "exp_avg")} for name in "ab"}
    checkpoints.save(step, iter(states.items()), [])
    checkpoints.close()


def newest(folder: Path) -> int | None:
    """The step of the newest one that is whole, which is the value of every number in it."""
    found = attempt(folder).newest()
    if found is None:
        return None
    tensors, manifest = found
    assert all((t == manifest["step"]).all() for one in tensors.values() for t in one.values())
    return int(manifest["step"])


def attempt(folder: Path) -> Checkpointer:
    """The checkpoints of one attempt. One stays, so that a save removes too; where reading fails, two."""
    resources = Resources(launch="inline").with_changes({"train.keep.last": 2 if "read" in folder.name else 1})
    return Checkpointer(str(folder), RankInfo(), resources, live=True)


def main(root: Path, count: int, seed: int) -> None:
    """All cases, each in a folder of its own."""
    faults, draw = ctypes.CDLL(None), random.Random(seed)
    cases: list[dict[str, Any]] = []
    for number in range(count):
        call = list(CALLS)[number % len(CALLS)]
        nth, error, done = draw.randint(1, CALLS[call]), draw.choice(ERRORS), draw.random() < 0.5
        folder = root / f"{number}-{call}"
        save(folder, 2)
        if call == "read":
            save(folder, 4)
        raised, found = None, None
        faults.arm(str(folder).encode(), call.encode(), nth, error, int(done))
        try:
            if call == "read":
                found = newest(folder)
            else:
                save(folder, 4)
        except OSError as failure:
            raised = {"errno": failure.errno, "text": str(failure)}
        hit = faults.disarm()
        case = {"call": call, "nth": nth, "errno": error, "done": done, "folder": str(folder), "hit": hit}
        after = found if call == "read" else newest(folder)
        save(folder, 4)
        cases.append({**case, "raised": raised, "after": after, "well": newest(folder)})
        shutil.rmtree(folder)
    sys.stdout.write(json.dumps(cases))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
