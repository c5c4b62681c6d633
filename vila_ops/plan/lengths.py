"""The lengths of an epoch's samples, from prepared data or from declared lengths, and statistics of their rows."""

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

MOST_SAMPLES = 2**17
"""The most samples that are drawn for an epoch. A larger epoch is represented by this many, with scaled sums."""
Array = NDArray[np.int64]


@dataclass(frozen=True)
class EpochLengths:
    """N samples that represent an epoch; each of them represents `times` samples."""

    tokens: Array
    """(N,) tokens, image tokens included."""
    targets: Array
    """(N,) target tokens."""
    images: Array
    """(N,) images."""
    times: float
    distinct: float
    """Share of the epoch's images that it has for the first time."""


@dataclass(frozen=True)
class RowStatistics:
    """Statistics of the rows of an epoch."""

    rows: float
    useful: tuple[Load, ...]
    """Loads without padding, one of all rows with images and one of all rows without."""
    padded: tuple[Load, ...]
    """The same loads with padding."""
    longest: int
    """Tokens of the longest row."""
    most_images: int
    """Most images of a row."""


def prepared(dataset: Dataset, mixture: Mixture) -> EpochLengths:
    """Return the lengths of an epoch of prepared data; samples repeat as often as in the mixture's blend."""
    columns = ["source", "split", "num_tokens", "num_targets", "num_images"]
    table = pq.read_table(file(dataset, INDEX), columns=columns, filters=[("split", "=", "train")])
    source = table["source"].to_numpy()
    arrays = [table[name].to_numpy().astype(np.int64) for name in columns[2:]]
    numbers = {name: np.flatnonzero(source == name) for name in mixture.sources}
    sizes = {name: Size(len(at), int(arrays[0][at].sum())) for name, at in numbers.items()}
    return _draw_epoch(mixture, sizes, {name: [array[at] for array in arrays] for name, at in numbers.items()})


def declared(lengths: Lengths, mixture: Mixture, *, image_tokens: int, max_tokens: int) -> EpochLengths:
    """Draw the lengths of an epoch from declared distributions, cut at `max_tokens`, without images that do not fit.

    Raises ValueError for a source of the mixture that has no declared lengths.
    """
    if missing := [name for name in mixture.sources if name not in lengths.sources]:
        raise ValueError(
            f"the lengths do not have sources {missing} of mixture {mixture.name!r}; add them, or prepare the mixture"
        )
    groups = {name: lengths.sources[name] for name in mixture.sources}
    most = max_tokens // image_tokens
    samples = {name: sum(group.samples for group in parts) for name, parts in groups.items()}
    pools: dict[str, list[Array]] = {}
    for number, (name, parts) in enumerate(sorted(groups.items())):
        rng = np.random.default_rng([0, number])
        share = min(1.0, MOST_SAMPLES / samples[name])
        drawn = [_draw_group(group, max(1, round(group.samples * share)), rng, most=most) for group in parts]
        text, targets, images = (np.concatenate(column) for column in zip(*drawn, strict=True))
        tokens = np.minimum(max_tokens, text + images * image_tokens)
        pools[name] = [tokens, np.minimum(targets, tokens - images * image_tokens), images]
    sizes = {name: Size(samples[name], round(samples[name] * float(pool[0].mean()))) for name, pool in pools.items()}
    return _draw_epoch(mixture, sizes, pools)


def _draw_group(group: LengthGroup, count: int, rng: np.random.Generator, *, most: int) -> tuple[Array, Array, Array]:
    """Draw text tokens, target tokens and images of `count` samples. Text tokens are log-normal with the given mean."""
    mean = math.log(group.text_tokens) - group.spread**2 / 2
    text = np.maximum(1, np.rint(rng.lognormal(mean, group.spread, count))).astype(np.int64)
    images = np.minimum(most, np.floor(group.images + rng.random(count))).astype(np.int64)
    return text, np.maximum(1, np.rint(text * group.target_share)).astype(np.int64), images


def _draw_epoch(mixture: Mixture, sizes: dict[str, Size], pools: dict[str, list[Array]]) -> EpochLengths:
    """Draw the samples of an epoch from a pool per source: tokens, target tokens and images of its samples."""
    shares = compose(mixture, sizes).shares
    times = max(1.0, sum(share.samples_per_epoch for share in shares.values()) / MOST_SAMPLES)
    drawn: list[list[Array]] = []
    seen = new = 0.0
    for number, name in enumerate(sorted(pools)):
        pool, share = pools[name], shares[name]
        count, size = max(1, round(share.samples_per_epoch / times)), len(pool[0])
        rng = np.random.default_rng([1, number])
        order = np.concatenate([rng.permutation(size) for _ in range(-(-count // size))])[:count]
        drawn.append([column[order] for column in pool])
        images = float(pool[2][order].sum())
        seen += images
        new += images * min(1.0, 1 / share.repeats)
    tokens, targets, image_counts = (np.concatenate(column) for column in zip(*drawn, strict=True))
    return EpochLengths(tokens, targets, image_counts, times, new / seen if seen else 1.0)


def rows_of(epoch: EpochLengths, stage: Stage, *, micro_batch_size: int, most_images: int) -> RowStatistics:
    """Return statistics of the rows of an epoch.

    Rows are packed by the planner, or hold one sample and are padded to the longest of their micro-batch. `most_images`
    is the most images of a packed row.
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
    """Return the load of the epoch's samples of one kind, each in a segment of its length."""
    segments = lengths[kind]
    pairs = segments * (segments + 1) / 2
    return Load(*_scaled_sums(epoch.times, segments, pairs, epoch.images[kind], epoch.targets[kind]))


def _scaled_sums(times: float, *arrays: NDArray[np.number]) -> Iterator[float]:
    for array in arrays:
        yield float(array.sum()) * times
