"""What the ranks of a stage tell each other about checkpoints, in a process group of their own.

So a thread may talk while the loop's collectives go on, and NCCL has no part in it.
"""

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from vila_ops.train.job import RankInfo


class Ranks:
    """Every rank makes one, and calls the same methods in the same order, from one thread at a time."""

    def __init__(self, place: RankInfo, *, timeout_seconds: float) -> None:
        self.place = place
        self._group = None
        if place.world_size > 1:
            timeout = timedelta(seconds=timeout_seconds)
            self._group = torch.distributed.new_group(backend="gloo", timeout=timeout)

    def gather(self, said: Any) -> list[Any]:
        """What every rank says, as JSON values, by rank."""
        if self._group is None:
            return [said]
        own = torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)
        sizes = [int(size) for size in self._all(torch.tensor([len(own)]))]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(own)] = own
        texts = zip(self._all(padded), sizes, strict=True)
        return [json.loads(bytes(text[:size].tolist())) for text, size in texts]

    def together(self, action: Callable[[], Any]) -> list[Any]:
        """What an action gave on every rank, as JSON values; where it failed on one rank, it raises on all."""
        failure: OSError | ValueError | None = None
        try:
            said = {"gave": action()}
        except (OSError, ValueError) as error:
            failure, said = error, {"failed": str(error)}
        answers = self.gather(said)
        if failure is not None:
            raise failure
        for rank, answer in enumerate(answers):
            if "failed" in answer:
                raise OSError(f"rank {rank}: {answer['failed']}")
        return [answer["gave"] for answer in answers]

    def _all(self, own: Tensor) -> list[Tensor]:
        every = [torch.empty_like(own) for _ in range(self.place.world_size)]
        torch.distributed.all_gather(every, own, group=self._group)
        return every
