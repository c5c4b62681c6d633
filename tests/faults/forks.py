"""Stages in processes that are forked from one that has imported everything: `python forks.py`, a task on each line.

Importing torch and DeepSpeed takes many times as long as a tiny stage does. A task is answered on a line with the exit
code of each of its processes. It has either

    stage    what `ResumeTrial` of verify_resume holds: the task `train_stage` in one process, or
    job      of vila_ops.train.job: the training loop of `world_size` ranks that meet at `rendezvous`,

and may have

    until    steps: once any process reads samples for a later one, all are killed a moment afterwards
    points   a file, to which each call that the file system sees in order is written
    kill     one of these points, and `before` or `after` it
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

import process_group
import torch

from vila_ops.train import engine, loop
from vila_ops.train.job import RankInfo, TrainJob
from vila_ops.train.sample_log import read_sample_log
from vila_ops.train.verify_resume import ResumeTrial

CALLS = ("fsync", "rename", "replace", "link", "unlink", "rmdir")
RANDOM = re.compile(r"[0-9a-f]{8,}|(?<=/)[0-9a-f]{2}(?=/)|(?<=\.probe-)\w+|(?<=tmp)\w{8}")
POLL_SECONDS = 0.005
Task = dict[str, Any]


def main() -> None:
    torch.set_num_threads(1)
    engine._import_deepspeed()
    _answer("ready")
    for line in sys.stdin:
        _answer(_run(json.loads(line)))


def _answer(told: Any) -> None:
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()


def _run(task: Task) -> list[int]:
    """The exit codes; processes that outlive one that failed, or reach `until`, are killed."""
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
    """The last step for which samples were read, counted from 1, in this attempt."""
    job = TrainJob.model_validate(task["job"])
    steps = [read.step for read in read_sample_log(job.samples()) if read.attempt == Path(job.attempt).name]
    return 1 + max(steps, default=-1)


def _fork(task: Task, rank: int) -> int:
    if pid := os.fork():
        return pid
    os.dup2(2, 1)
    code = 1
    try:
        if "points" in task or "kill" in task:
            _count_calls(task)
        if "stage" in task:
            ResumeTrial.model_validate(task["stage"]).train()
        else:
            _rank(task, rank)
        code = 0
    except BaseException:  # noqa: BLE001 the process ends here, whatever it was
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
    """Name each call by what it does to which file, and by how often that was done before; kill at the one asked for.

    Any thread may call: the names do not depend on the order of threads.
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
            finally:  # also one that failed, as the second link of a store's probe is meant to
                if (own, "after") == (point, side):
                    os.kill(os.getpid(), signal.SIGKILL)

        return call

    for name in CALLS:
        setattr(os, name, counted(name, getattr(os, name)))


def _named(given: Any, folder: int | None, root: str) -> str:
    """A file's place in the store, or its name, without what is random."""
    path = os.readlink(f"/proc/self/fd/{given}") if isinstance(given, int) else os.fspath(given)
    if folder is not None:
        path = f"{os.readlink(f'/proc/self/fd/{folder}')}/{path}"
    return RANDOM.sub("*", path.removeprefix(root).removesuffix(" (deleted)"))


if __name__ == "__main__":
    main()
