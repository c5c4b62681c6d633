"""Samples to packed sequences (rows): the model inputs of samples that share a row. Pure.

B rows, T tokens of a row, I images.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vila_ops.data.shards import Sample

IGNORE_INDEX = -100


@dataclass(frozen=True)
class PackedRow:
    """Samples in sequence, separated by positions that restart and a segment number for each sample."""

    input_ids: NDArray[np.int64]
    """(T,)"""
    position_ids: NDArray[np.int64]
    """(T,), from 0 in each sample."""
    segment_ids: NDArray[np.int64]
    """(T,), 1, 2, ... by sample; 0 is padding."""
    labels: NDArray[np.int64]
    """(T,): the target at this position, which is the next token of the same sample, or IGNORE_INDEX."""
    images: tuple[bytes, ...]
    """Encoded squares, in order of their placeholders."""
    num_images: tuple[int, ...]
    """Images of each sample, in order."""
    keys: tuple[str, ...]
    """Keys of the samples, in order."""
    sources: tuple[str, ...]
    """Sources of the samples, in order."""

    def samples_of_targets(self) -> NDArray[np.int64]:
        """(N,), from 0: the sample of each of the N targets, in order."""
        return self.segment_ids[self.labels >= 0] - 1

    def keys_of_images(self) -> list[str]:
        """The key of each image's sample."""
        return [key for key, number in zip(self.keys, self.num_images, strict=True) for _ in range(number)]


def images_of(rows: Iterable[PackedRow]) -> list[bytes]:
    """The images of some rows, in order."""
    return [image for row in rows for image in row.images]


def pack(samples: Sequence[Sample], *, capacity: int) -> PackedRow:
    """A row of `capacity` positions with these samples and padding. Raises ValueError if they do not fit."""
    used = sum(len(sample.input_ids) for sample in samples)
    if used > capacity:
        raise ValueError(f"{used} tokens do not fit into a row of {capacity}")
    input_ids = np.zeros(capacity, np.int64)
    position_ids = np.zeros(capacity, np.int64)
    segment_ids = np.zeros(capacity, np.int64)
    labels = np.full(capacity, IGNORE_INDEX, np.int64)
    start = 0
    for number, sample in enumerate(samples, start=1):
        stop = start + len(sample.input_ids)
        ids = np.asarray(sample.input_ids, np.int64)
        input_ids[start:stop] = ids
        position_ids[start:stop] = np.arange(stop - start)
        segment_ids[start:stop] = number
        labels[start : stop - 1] = np.where(sample.is_target[1:], ids[1:], IGNORE_INDEX)
        start = stop
    images = tuple(image for sample in samples for image in sample.images)
    return PackedRow(
        input_ids,
        position_ids,
        segment_ids,
        labels,
        images=images,
        num_images=tuple(len(sample.images) for sample in samples),
        keys=tuple(sample.key for sample in samples),
        sources=tuple(sample.source for sample in samples),
    )
