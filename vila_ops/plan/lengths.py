"""The samples of an epoch as arrays, of prepared data or as a file declares them, and the rows that they fill."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vila_ops.artifacts.kinds import Dataset
from vila_ops.artifacts.store import file
from vila_ops.config import Mixture, Stage
from vila_ops.config.lengths import LengthGroup, Lengths
from vila_ops.data.loading.mixture import Size, compose
from vila_ops.data.loading.planner import plan
from vila_ops.data.shards import INDEX
from vila_ops.plan.flops import Load

DRAWN = 2**17
"""Samples that stand for an epoch of more; their sums are multiplied."""
Array = NDArray[np.int64]


@dataclass(frozen=True)
class EpochLengths:
    """N samples of an epoch, each of which stands for `times`."""

    tokens: Array
    """(N,), image tokens included."""
    targets: Array
    """(N,)"""
    images: Array
    """(N,)"""
    times: float
    distinct: float
    """Share of the epoch's images that it shows for the first time."""


@dataclass(frozen=True)
class RowStatistics:
    """What an epoch is to the model."""

    rows: float
    useful: tuple[Load, ...]
    """Without padding: of rows with images and of rows without."""
    padded: tuple[Load, ...]
    """With it."""
    longest: int
    """Tokens of the longest row."""
    most_images: int
    """Of a row."""


def prepared(dataset: Dataset, mixture: Mixture) -> EpochLengths:
    """An epoch of prepared data: the samples that it holds, as often as the mixture's blend shows them."""
    columns = ["source", "split", "num_tokens", "num_targets", "num_images"]
    table = pq.read_table(file(dataset, INDEX), columns=columns, filters=[("split", "=", "train")])
    source = table["source"].to_numpy()
    arrays = [table[name].to_numpy().astype(np.int64) for name in columns[2:]]
    own = {name: np.flatnonzero(source == name) for name in mixture.sources}
    sizes = {name: Size(len(at), int(arrays[0][at].sum())) for name, at in own.items()}
    return _drawn(mixture, sizes, {name: [array[at] for array in arrays] for name, at in own.items()})


def declared(lengths: Lengths, mixture: Mixture, *, image_tokens: int, max_tokens: int) -> EpochLengths:
    """An epoch of samples drawn from declared lengths, cut at `max_tokens`; images that do not fit are left out.

    Raises ValueError for a source of the mixture of which nothing is declared.
    """
    if missing := [name for name in mixture.sources if name not in lengths.sources]:
        raise ValueError(
            f"the lengths say nothing of sources {missing} of mixture {mixture.name!r}; add them, or prepare it"
        )
    groups = {name: lengths.sources[name] for name in mixture.sources}
    most = max_tokens // image_tokens
    samples = {name: sum(group.samples for group in own) for name, own in groups.items()}
    pools: dict[str, list[Array]] = {}
    for number, (name, own) in enumerate(sorted(groups.items())):
        draw = np.random.default_rng([0, number])
        share = min(1.0, DRAWN / samples[name])
        parts = [_group(group, max(1, round(group.samples * share)), draw, most=most) for group in own]
        text, targets, images = (np.concatenate(column) for column in zip(*parts, strict=True))
        tokens = np.minimum(max_tokens, text + images * image_tokens)
        pools[name] = [tokens, np.minimum(targets, tokens - images * image_tokens), images]
    sizes = {name: Size(samples[name], round(samples[name] * float(pool[0].mean()))) for name, pool in pools.items()}
    return _drawn(mixture, sizes, pools)


def _group(group: LengthGroup, count: int, draw: np.random.Generator, *, most: int) -> tuple[Array, Array, Array]:
    """Text tokens, targets and images of some samples."""
    mean = math.log(group.text_tokens) - group.spread**2 / 2
    text = np.maximum(1, np.rint(draw.lognormal(mean, group.spread, count))).astype(np.int64)
    images = np.minimum(most, np.floor(group.images + draw.random(count))).astype(np.int64)
    return text, np.maximum(1, np.rint(text * group.target_share)).astype(np.int64), images


def _drawn(mixture: Mixture, sizes: dict[str, Size], pools: dict[str, list[Array]]) -> EpochLengths:
    """The samples of an epoch from those of each source, which are all of them or stand for all."""
    shares = compose(mixture, sizes).shares
    times = max(1.0, sum(share.samples_per_epoch for share in shares.values()) / DRAWN)
    taken: list[list[Array]] = []
    seen = new = 0.0
    for number, name in enumerate(sorted(pools)):
        pool, share = pools[name], shares[name]
        count, size = max(1, round(share.samples_per_epoch / times)), len(pool[0])
        draw = np.random.default_rng([1, number])
        order = np.concatenate([draw.permutation(size) for _ in range(-(-count // size))])[:count]
        taken.append([column[order] for column in pool])
        images = float(pool[2][order].sum())
        seen += images
        new += images * min(1.0, 1 / share.repeats)
    tokens, targets, images_ = (np.concatenate(column) for column in zip(*taken, strict=True))
    return EpochLengths(tokens, targets, images_, times, new / seen if seen else 1.0)


def rows_of(epoch: EpochLengths, stage: Stage, *, micro_batch_size: int, most_images: int) -> RowStatistics:
    """The rows that an epoch fills: packed by the planner, or one a sample, as long as the longest of its micro-batch.

    `most_images` fit into a packed row.
    """
    if stage.pack:
        number = len(plan(epoch.tokens, capacity=stage.sequence_length, seed=[0]))
        padding = number * stage.sequence_length - int(epoch.tokens.sum())
        useful = _load(epoch, np.ones(len(epoch.tokens), np.bool_), epoch.tokens)
        padded = Load(useful.tokens + padding * epoch.times, useful.pairs, useful.images, useful.targets)
        return RowStatistics(number * epoch.times, (useful,), (padded,), stage.sequence_length, most_images)
    order = np.random.default_rng([2]).permutation(len(epoch.tokens))
    longest = np.empty_like(epoch.tokens)
    for start in range(0, len(order), micro_batch_size):
        batch = order[start : start + micro_batch_size]
        longest[batch] = epoch.tokens[batch].max()
    kinds = [kind for kind in (epoch.images > 0, epoch.images == 0) if kind.any()]
    return RowStatistics(
        rows=len(epoch.tokens) * epoch.times,
        useful=tuple(_load(epoch, kind, epoch.tokens) for kind in kinds),
        padded=tuple(_load(epoch, kind, longest) for kind in kinds),
        longest=int(epoch.tokens.max()),
        most_images=int(epoch.images.max()),
    )


def _load(epoch: EpochLengths, kind: NDArray[np.bool_], lengths: Array) -> Load:
    own = lengths[kind]
    return Load(*_sums(epoch.times, own, own * (own + 1) / 2, epoch.images[kind], epoch.targets[kind]))


def _sums(times: float, *arrays: NDArray[np.number]) -> Iterator[float]:
    for array in arrays:
        yield float(array.sum()) * times
