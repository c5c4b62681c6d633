"""Shared by the scripts of single ranks: join a process group, and end when all ranks are done."""

import os
import sys

import torch


def join(rank: int, world_size: int, rendezvous: str) -> None:
    """Join the process group. DeepSpeed reads rank and world size from the environment."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)


def end() -> None:
    """End this process, whose results are on disk.

    A normal exit may abort the process, even after destroy_process_group, as a thread of gloo can outlive the
    interpreter.
    """
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
