"""Stages in forked processes, which may be killed: `stages.py TASK.json CODES.json` writes their exit codes.

A task has either

    stage    a `ResumeTrial`: runs the task `train_stage` in one process, or
    job      a `TrainJob`: runs the training loop in `world_size` ranks that meet at `rendezvous`,

and may have

    until    a step: when a process reads samples of a later step, all processes are killed after `moment` seconds
    points   a file to which the calls that order the file system are written
    kill     one of these points, and `before` or `after`
"""

import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.train import process_group
from vila_ops.train import loop
from vila_ops.train.job import RankInfo, TrainJob
from vila_ops.train.sample_log import read_sample_log
from vila_ops.train.verify_resume import ResumeTrial

CALLS = ("fsync", "rename", "replace", "link", "unlink", "rmdir")
RANDOM = re.compile(r"[0-9a-f]{8,}|(?<=/)[0-9a-f]{2}(?=/)|(?<=\.probe-)\w+|(?<=tmp)\w{8}")
POLL_SECONDS = 0.005
Task = dict[str, Any]


def main(task: Path, codes: Path) -> None:
    codes.write_text(json.dumps(_run(json.loads(task.read_text()))))


def _run(task: Task) -> list[int]:
    """Return the exit codes. When a process fails or reaches `until`, the others are killed."""
    living = {_fork(task, rank): rank for rank in range(task.get("world_size", 1))}
    codes = [0] * len(living)
    while living:
        time.sleep(POLL_SECONDS)
        for pid in list(living):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[living.pop(pid)] = os.waitstatus_to_exitcode(status)
        if any(codes) or (task.get("until") is not None and _reached(task) > task["until"]):
            time.sleep(task.get("moment", 0.0))
            for pid in living:
                os.kill(pid, signal.SIGKILL)
    return codes


def _reached(task: Task) -> int:
    """Return the last step whose samples this attempt has read, counted from 1."""
    job = TrainJob.model_validate(task["job"])
    steps = [read.step for read in read_sample_log(job.sample_log()) if read.attempt == Path(job.attempt).name]
    return 1 + max(steps, default=-1)


def _fork(task: Task, rank: int) -> int:
    if pid := os.fork():
        return pid
    code = 1
    try:
        if "points" in task or "kill" in task:
            _count_calls(task)
        if "stage" in task:
            ResumeTrial.model_validate(task["stage"]).train()
        else:
            _rank(task, rank)
        code = 0
    except BaseException:  # noqa: BLE001 the process ends here after any error
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


def _rank(task: Task, rank: int) -> None:
    job, rank_info = TrainJob.model_validate(task["job"]), RankInfo(rank=rank, world_size=task.get("world_size", 1))
    if job.resources.launch == "ray":
        process_group.join(rank, rank_info.world_size, task["rendezvous"])
    loop.train(job, rank_info)
    if job.resources.launch == "ray":
        torch.distributed.barrier()


def _count_calls(task: Task) -> None:
    """Name each call by its function, its file and its count, and kill this process at the requested call.

    The names do not depend on the order in which threads make the calls.
    """
    seen: Counter[str] = Counter()
    lock = threading.Lock()
    root = ResumeTrial.model_validate(task["stage"]).resources.storage.store
    point, side = task.get("kill", (None, None))

    def counted(name: str, honest: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            with lock:
                what = f"{name} {_named(args[0], more.get('dir_fd'), root)}"
                seen[what] += 1
                own = f"{what} #{seen[what]}"
                if "points" in task:
                    with open(task["points"], "a") as file:
                        file.write(f"{own}\n")
            if (own, "before") == (point, side):
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return honest(*args, **more)
            finally:  # also after a failed call, as the second link of a store's probe has to fail
                if (own, "after") == (point, side):
                    os.kill(os.getpid(), signal.SIGKILL)

        return call

    for name in CALLS:
        setattr(os, name, counted(name, getattr(os, name)))


def _named(given: Any, folder: int | None, root: str) -> str:
    """Return a file's path in the store with its random parts replaced."""
    path = os.readlink(f"/proc/self/fd/{given}") if isinstance(given, int) else os.fspath(given)
    if folder is not None:
        path = f"{os.readlink(f'/proc/self/fd/{folder}')}/{path}"
    return RANDOM.sub("*", path.removeprefix(root).removesuffix(" (deleted)"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
