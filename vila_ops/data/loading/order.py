"""The order of samples and rows: a pure function of (data digest, seed, epoch), the same for any world size.

An epoch draws from each source the next part of its endless stream of permutations, packs all draws into rows, or
gives each draw a row, and shuffles the rows. This plan is computed once for each epoch and cached; any row of a cached
plan takes one read.
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

CACHED_FROM = 100_000
"""Samples of an epoch from which its plan is cached; smaller epochs are planned again (0.1 s)."""


class EpochRequest(NamedTuple):
    """The inputs that determine the order of all epochs."""

    digest: str
    """Digest of the data."""
    seed: int
    capacity: int | None
    """Tokens in a row; None if a row is one sample."""
    samples_per_epoch: dict[str, int]
    """By source."""


class EpochPlan(Protocol):
    """The rows of one epoch."""

    def __len__(self) -> int:
        """Number of rows."""

    def row(self, number: int) -> NDArray[np.uint32]:
        """The samples of a row."""


class CachedPlan:
    """The cached plan of an epoch; a row takes one read."""

    def __init__(self, arrays: Arrays) -> None:
        self._arrays = arrays

    def __len__(self) -> int:
        return int(self._arrays.facts["num_rows"])

    def row(self, number: int) -> NDArray[np.uint32]:
        """The samples of a row. Raises DamagedCache."""
        start, stop = self._arrays.read("starts", number, number + 2).tolist()
        return self._arrays.read("members", start, stop)


def epoch_plan(request: EpochRequest, epoch: int, *, index: Index, cache: Path) -> EpochPlan:
    """The rows of an epoch; the plan of a large epoch is cached."""
    if sum(request.samples_per_epoch.values()) < CACHED_FROM:
        return _plan(request, epoch, index)
    name = fingerprint({"plan": PLAN_REVISION, "epoch": epoch, **request._asdict()})[:32]
    return CachedPlan(Arrays(cache / f"plan-{name}", lambda folder: _write(_plan(request, epoch, index), folder)))


def draws(request: EpochRequest, epoch: int, index: Index) -> NDArray[np.uint32]:
    """The samples of an epoch, source by source."""
    groups = {group.source: group for group in index.groups if group.split == "train"}
    drawn = np.empty(sum(request.samples_per_epoch.values()), np.uint32)
    start = 0
    for name, count in request.samples_per_epoch.items():
        numbers = index.numbers(groups[name])
        for part in _passes(request, name, size=len(numbers), start=epoch * count, count=count):
            drawn[start : start + len(part)] = numbers[part]
            start += len(part)
    return drawn


def random_state(digest: str, *, seed: int, number: int, name: str) -> list[int]:
    """The seed of the draw `name` for one dataset; `number` counts passes or epochs."""
    return [int(digest[:16], 16), seed, number, *name.encode()]


def _passes(request: EpochRequest, name: str, *, size: int, start: int, count: int) -> Iterator[NDArray[np.uint32]]:
    """`count` positions in the endless stream of a source's permutations, from `start` on, pass by pass.

    So in k epochs each sample of a source occurs floor or ceil of k * count / size times.
    """
    for number in range(start // size, (start + count - 1) // size + 1):
        order = np.arange(size, dtype=np.uint32)
        np.random.default_rng(random_state(request.digest, seed=request.seed, number=number, name=name)).shuffle(order)
        yield order[max(0, start - number * size) : start + count - number * size]


def _plan(request: EpochRequest, epoch: int, index: Index) -> PackingPlan:
    seed = random_state(request.digest, seed=request.seed, number=epoch, name="order")
    drawn = draws(request, epoch, index)
    if request.capacity is None:
        return one_each(drawn, seed=seed)
    return plan(index.num_tokens(), capacity=request.capacity, seed=seed, draws=drawn)


def _write(packing: PackingPlan, folder: Path) -> dict[str, Any]:
    np.save(folder / "starts.npy", packing.starts)
    np.save(folder / "members.npy", packing.members)
    return {"num_rows": len(packing)}
