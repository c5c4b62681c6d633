"""Saves on a disk that fails: `LD_PRELOAD=faulty_disk.so python disk_that_fails.py FOLDER COUNT SEED`.

Prints as JSON for every case its fault, the error that was raised, and the step of the newest intact checkpoint after
the fault and after the disk was repaired.
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
"""The calls of a save (`read`: of a resume), and how often they are made at least."""
ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT)


def save(folder: Path, step: int) -> None:
    """Save and wait for the end of the save."""
    checkpoints = attempt(folder)
    states = {name: {kind: torch.full((100, 500), float(step)) for kind in ("param", "exp_avg")} for name in "ab"}
    checkpoints.save(step, iter(states.items()), [])
    checkpoints.close()


def newest(folder: Path) -> int | None:
    """Return the step of the newest intact checkpoint. Every value in it must be that step."""
    checkpoint = attempt(folder).newest()
    if checkpoint is None:
        return None
    tensors, manifest = checkpoint
    assert all((t == manifest["step"]).all() for one in tensors.values() for t in one.values())
    return int(manifest["step"])


def attempt(folder: Path) -> Checkpointer:
    """Return the checkpointer of an attempt. It keeps one checkpoint, so that a save removes one, and two for reads."""
    resources = Resources(launch="inline").with_changes({"train.keep.last": 2 if "read" in folder.name else 1})
    return Checkpointer(str(folder), RankInfo(), resources, live=True)


def main(root: Path, count: int, seed: int) -> None:
    """Run all cases, each in a separate folder."""
    faults, draw = ctypes.CDLL(None), random.Random(seed)
    cases: list[dict[str, Any]] = []
    for number in range(count):
        call = list(CALLS)[number % len(CALLS)]
        nth, error, done = draw.randint(1, CALLS[call]), draw.choice(ERRORS), draw.random() < 0.5
        folder = root / f"{number}-{call}"
        save(folder, 2)
        if call == "read":
            save(folder, 4)
        raised, read = None, None
        faults.arm(str(folder).encode(), call.encode(), nth, error, int(done))
        try:
            if call == "read":
                read = newest(folder)
            else:
                save(folder, 4)
        except OSError as failure:
            raised = {"errno": failure.errno, "text": str(failure)}
        hit = faults.disarm()
        case = {"call": call, "nth": nth, "errno": error, "done": done, "folder": str(folder), "hit": hit}
        after = read if call == "read" else newest(folder)
        save(folder, 4)
        cases.append({**case, "raised": raised, "after": after, "well": newest(folder)})
        shutil.rmtree(folder)
    sys.stdout.write(json.dumps(cases))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
