"""Shared by the scripts of single ranks: join a process group, and end when all ranks are done."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def join(rank: int, world_size: int, rendezvous: str) -> None:
    """Join the process group. DeepSpeed reads rank and world size from the environment."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)


@contextmanager
def joined(rank: int, world_size: int, rendezvous: str) -> Iterator[None]:
    """Join the process group, and end this process after the block: with code 0 when all ranks are done, or with 1.

    Results are on disk by then. A normal exit may abort or hang, even after destroy_process_group, as a thread of gloo
    can outlive the interpreter.
    """
    code = 1
    try:
        join(rank, world_size, rendezvous)
        yield
        torch.distributed.barrier()
        code = 0
    finally:
        if code:  # the interpreter does not get to it
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
