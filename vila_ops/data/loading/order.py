"""The order of samples and rows: a pure function of (data digest, seed, epoch), the same for any world size.

An epoch draws from each source the next stretch of its endless permutations, packs all draws into rows, or gives each
a row, and shuffles the rows. That plan is made once for each epoch and kept in a cache, where any row of it is one read
away.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from vila_ops.config.base import fingerprint
from vila_ops.data.loading.arrays import Arrays
from vila_ops.data.loading.index import Index
from vila_ops.data.loading.planner import PLAN_REVISION, PackingPlan, one_each, plan

KEPT_FROM = 100_000
"""Samples of an epoch; smaller ones are planned (0.1 s) rather than kept."""


class EpochRequest(NamedTuple):
    """What the order of all epochs is a function of."""

    digest: str
    """Of the data."""
    seed: int
    capacity: int | None
    """Tokens of a row; None: a row is one sample."""
    samples_per_epoch: dict[str, int]
    """Of each source."""


class EpochPlan(Protocol):
    """The rows of one epoch."""

    def __len__(self) -> int:
        """How many."""

    def row(self, number: int) -> NDArray[np.uint32]:
        """The samples of a row."""


class KeptPlan:
    """The plan of an epoch in the cache, where a row is one read away."""

    def __init__(self, arrays: Arrays) -> None:
        self._arrays = arrays

    def __len__(self) -> int:
        return int(self._arrays.facts["num_rows"])

    def row(self, number: int) -> NDArray[np.uint32]:
        """The samples of a row; raises DamagedCache."""
        start, stop = self._arrays.read("starts", number, number + 2).tolist()
        return self._arrays.read("members", start, stop)


def epoch_plan(asked: EpochRequest, epoch: int, *, index: Index, cache: Path) -> EpochPlan:
    """The rows of an epoch, from the cache where it is large enough to be kept."""
    if sum(asked.samples_per_epoch.values()) < KEPT_FROM:
        return _plan(asked, epoch, index)
    name = fingerprint({"plan": PLAN_REVISION, "epoch": epoch, **asked._asdict()})[:32]
    return KeptPlan(Arrays(cache / f"plan-{name}", lambda folder: _write(_plan(asked, epoch, index), folder)))


def draws(asked: EpochRequest, epoch: int, index: Index) -> NDArray[np.uint32]:
    """The samples of an epoch, source by source."""
    groups = {group.source: group for group in index.groups if group.split == "train"}
    drawn = np.empty(sum(asked.samples_per_epoch.values()), np.uint32)
    start = 0
    for name, count in asked.samples_per_epoch.items():
        numbers = index.numbers(groups[name])
        for passed in _passes(asked, name, size=len(numbers), start=epoch * count, count=count):
            drawn[start : start + len(passed)] = numbers[passed]
            start += len(passed)
    return drawn


def random_state(digest: str, *, seed: int, number: int, name: str) -> list[int]:
    """What seeds a draw about `name`, for one data set; `number` counts passes or epochs."""
    return [int(digest[:16], 16), seed, number, *name.encode()]


def _passes(asked: EpochRequest, name: str, *, size: int, start: int, count: int) -> Iterator[NDArray[np.uint32]]:
    """`count` places of the endless stream of a source's permutations, from `start` on, pass by pass.

    So k epochs see each sample of a source floor or ceil of k * count / size times.
    """
    for number in range(start // size, (start + count - 1) // size + 1):
        order = np.arange(size, dtype=np.uint32)
        np.random.default_rng(random_state(asked.digest, seed=asked.seed, number=number, name=name)).shuffle(order)
        yield order[max(0, start - number * size) : start + count - number * size]


def _plan(asked: EpochRequest, epoch: int, index: Index) -> PackingPlan:
    seed = random_state(asked.digest, seed=asked.seed, number=epoch, name="order")
    drawn = draws(asked, epoch, index)
    if asked.capacity is None:
        return one_each(drawn, seed=seed)
    return plan(index.num_tokens(), capacity=asked.capacity, seed=seed, draws=drawn)


def _write(made: PackingPlan, folder: Path) -> dict[str, Any]:
    np.save(folder / "starts.npy", made.starts)
    np.save(folder / "members.npy", made.members)
    return {"num_rows": len(made)}
