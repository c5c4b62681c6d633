"""What the scripts of single ranks share: they join a group of processes, and end when all have done their work."""

import os
import sys

import torch


def join(rank: int, world_size: int, rendezvous: str) -> None:
    """Meet the other ranks, as every launcher makes them meet; DeepSpeed asks the environment for its place."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)


def end() -> None:
    """End this process, whose work is done and on disk.

    Not through the interpreter: a thread of gloo may outlive it, which aborts the process when everything is done, now
    and then also after destroy_process_group.
    """
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
