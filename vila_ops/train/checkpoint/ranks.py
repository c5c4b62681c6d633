"""Communication between the ranks of a stage about checkpoints, in a separate gloo process group.

The separate group lets a thread communicate while the loop's collectives run, and keeps NCCL out of it.
"""

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from vila_ops.errors import VilaError
from vila_ops.train.job import RankInfo


class Ranks:
    """All ranks create one and call the same methods in the same order, from one thread at a time."""

    def __init__(self, rank_info: RankInfo, *, timeout_seconds: float) -> None:
        self.rank_info = rank_info
        self._group = None
        if rank_info.world_size > 1:
            timeout = timedelta(seconds=timeout_seconds)
            self._group = torch.distributed.new_group(backend="gloo", timeout=timeout)

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, by rank. A value is anything that JSON can hold."""
        if self._group is None:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [int(size) for size in self._all_gather(torch.tensor([len(text)]))]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(text)] = text
        texts = zip(self._all_gather(padded), sizes, strict=True)
        return [json.loads(bytes(text[:size].tolist())) for text, size in texts]

    def run_on_all(self, action: Callable[[], Any]) -> list[Any]:
        """Run an action on every rank and return its results, by rank. A failure on one rank raises on all.

        Raises the action's own VilaError, OSError or ValueError where it failed, and OSError with its text elsewhere.
        """
        failure: Exception | None = None
        try:
            outcome = {"result": action()}
        except (VilaError, OSError, ValueError) as error:
            failure, outcome = error, {"error": str(error)}
        outcomes = self.gather(outcome)
        if failure is not None:
            raise failure
        for rank, one in enumerate(outcomes):
            if "error" in one:
                raise OSError(f"rank {rank}: {one['error']}")
        return [one["result"] for one in outcomes]

    def _all_gather(self, tensor: Tensor) -> list[Tensor]:
        tensors = [torch.empty_like(tensor) for _ in range(self.rank_info.world_size)]
        torch.distributed.all_gather(tensors, tensor, group=self._group)
        return tensors
