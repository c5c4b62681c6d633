"""Each task on a disk that fails in it: `LD_PRELOAD=faulty_disk.so python tasks_on_failing_disk.py FOLDER SEED`.

Prints as JSON for every task the digest on a disk that never failed, and for a disk whose nth write failed, and all
after it, the error, what was left, and the digest of the next try on the repaired disk. Each try is a process of its
own, since one that could not release its lease has to end first. The last write of a task may be that release, whose
failure costs nothing.
"""

import ctypes
import errno
import json
import os
import random
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests import made_elsewhere
from vila_ops.artifacts import leases
from vila_ops.artifacts.attempts import unsealed
from vila_ops.artifacts.exports import export
from vila_ops.artifacts.kinds import Artifact, Checkpoint, Dataset, EvalReport, Pretrained
from vila_ops.artifacts.store import verify_folder
from vila_ops.config import Resources
from vila_ops.data.preprocess import build
from vila_ops.data.preprocess.prepare import prepare
from vila_ops.eval import runner
from vila_ops.eval.evaluate import evaluate
from vila_ops.model import folder
from vila_ops.model.assemble import assemble
from vila_ops.train import loop, watchdog
from vila_ops.train.stage import train_stage

PRELOADED = (build, runner, folder, loop)
"""Imported before the forks, as the tasks import them when there is work."""
TASKS = ("assemble", "prepare", "train_stage", "evaluate", "export")
ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
NEVER = 2**30


def run(task: str, root: Path, disk: Path, parents: dict[str, Any]) -> Artifact | str:
    """Run a task whose store or output is on the disk."""
    model, mixture = made_elsewhere.model(root), made_elsewhere.mixture(root)
    places = {"storage.store": f"{disk}/store", "storage.cache": f"{root}/cache", "storage.data": f"{root}/data"}
    resources = Resources(launch="inline").with_changes(places)
    match task:
        case "assemble":
            return assemble(model, resources)
        case "prepare":
            return prepare(mixture, model.text(max_tokens=128), resources)
        case "train_stage":
            stage = made_elsewhere.stage(mixture)
            return train_stage(stage, model, parents["prepare"], parents["assemble"], resources)
        case "evaluate":
            return evaluate(made_elsewhere.suite(mixture), parents["train_stage"], parents["prepare"], resources)
        case _:
            export(parents["prepare"], disk / "out")
            return verify_folder(str(disk / "out"))


def forked(work: Callable[[], Any]) -> Any:
    """What `work` returns, as JSON holds it, in a process of its own."""
    read, write = os.pipe()
    if pid := os.fork():
        os.close(write)
        with os.fdopen(read, "rb") as answer:
            text = answer.read()
        os.waitpid(pid, 0)
        return json.loads(text)
    try:
        os.write(write, json.dumps(work()).encode())
    except BaseException:  # noqa: BLE001 the process ends here after any error
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(0)


def watched(faults: ctypes.CDLL, disk: Path, work: Callable[[], Any], *, nth: int, error: int = 0) -> dict[str, Any]:
    """What a task made, or its error; how many writes there were, and what was left of those that failed."""
    disk.mkdir(exist_ok=True)
    faults.arm(str(disk).encode(), b"write", nth, error, nth % 2)
    outcome = {}
    try:
        made = work()
        outcome["made"] = made if isinstance(made, str) else made.model_dump_json()
    except Exception as raised:  # noqa: BLE001 whatever it is, it is compared
        outcome["error"] = str(raised)
    return {**outcome, "writes": faults.seen(), "failed": faults.disarm(), "left": left(disk)}


def left(disk: Path) -> list[str]:
    """Files of attempts and drafts on the disk. What `prepare` sealed on its way is whole and stays."""
    hidden = [str(path) for path in disk.rglob(".*") if ".probe-" not in path.name]
    return [*(one.place for one in unsealed(f"{disk}/store")), *hidden]


def main(root: Path, seed: int) -> None:
    """Run each task on a disk that does not fail, on one that does, and there again."""
    torch.set_num_threads(1)
    leases.HEARTBEATS_PER_EXPIRY, watchdog.TICK_SECONDS = 1e-6, 1e6  # their number depends on the load
    faults, draw = ctypes.CDLL(None), random.Random(seed)
    parents: dict[str, Any] = {}
    cases = []
    for task in TASKS:

        def on(disk: Path, nth: int, error: int = 0, task: str = task) -> dict[str, Any]:
            work = lambda: run(task, root, disk, parents)  # noqa: E731
            return forked(lambda: watched(faults, disk, work, nth=nth, error=error))

        sound = on(root / "sound", NEVER)
        if "error" in sound:
            raise RuntimeError(f"{task} on a sound disk: {sound['error']}")
        disk, nth, error = root / f"disk-{task}", draw.randint(1, max(1, sound["writes"] - 1)), draw.choice(ERRORS)
        case = {"task": task, "nth": nth, "errno": error, "disk": str(disk), "sound": sound}
        cases.append({**case, "failed": on(disk, nth, error), "again": on(disk, NEVER)})
        parents[task] = sound["made"] if task == "export" else kind_of(task).model_validate_json(sound["made"])
    sys.stdout.write(json.dumps(cases))


def kind_of(task: str) -> type[Artifact]:
    """The class of what a task makes."""
    made: dict[str, type[Artifact]] = {"assemble": Pretrained, "prepare": Dataset, "train_stage": Checkpoint}
    return made.get(task, EvalReport)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
