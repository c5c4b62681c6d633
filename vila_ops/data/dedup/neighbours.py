"""For each image or text, an earlier one that nearly equals it, by sorted keys: not all pairs are compared."""

# P images, T texts, K minima

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray

from vila_ops.data.dedup.hashing import MINIMA, mix

THUMBNAIL_TOLERANCE = 12
"""Levels of 255 by which no channel of two 4 x 4 thumbnails may differ. Of resized and re-encoded copies 99.5 % are
within it, and of different images with like hashes (one shape in two colours) one pair in ten."""
_SURE = 0.999
"""Share of the pairs at the threshold that must become candidates."""
_KEY_BITS = 20
"""Bits of two hashes that must be equal before they are compared: each of a million random hashes then meets about
one other by chance."""
_MOST = 256
"""Comparisons of one item under one key. A copy is met at the first or second. If so many items share a key and differ
(pages of one template), comparing all of them would take quadratic time."""
_BLOCK = 1 << 18
"""Pairs compared at a time, so that memory stays bounded."""

Same = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.bool_]]
"""(pairs,), (pairs,) -> (pairs,): whether the two items of each pair are the same."""


@dataclass(frozen=True)
class ImageSignatures:
    """Images in the order of their records."""

    record: NDArray[np.int64]  # (P,)
    hashes: NDArray[np.uint64]  # (P,)
    thumbnails: NDArray[np.uint8]  # (P, 48)


@dataclass(frozen=True)
class _Runs:
    """For each item the range [first, stop) of `order` that holds the items with the same key."""

    items: NDArray[np.int64]
    first: NDArray[np.int64]
    stop: NDArray[np.int64]
    order: NDArray[np.int64]


def first_copies(images: ImageSignatures, *, among: ImageSignatures | None, bits: int) -> NDArray[np.int64]:
    """For each image (P,) the index of a copy in `among`, -1 if it has none.

    If `among` is None, copies are looked for in the images of earlier records.
    """
    known = among or images

    def same(items: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.bool_]:
        close: NDArray[np.bool_] = np.bitwise_count(images.hashes[items] ^ known.hashes[others]) <= bits
        if among is None:
            close &= images.record[items] != known.record[others]
        pairs = np.flatnonzero(close)
        thumbnails = images.thumbnails[items[pairs]].astype(np.int16)
        apart = np.abs(thumbnails - known.thumbnails[others[pairs]]).max(axis=1, initial=0)
        close[pairs] = apart <= THUMBNAIL_TOLERANCE
        return close

    def runs() -> Iterator[_Runs]:
        for mask in _masks(bits):
            if among is None:
                yield _runs_among(images.hashes & mask)
            else:
                yield _runs_between(images.hashes & mask, among.hashes & mask)

    return _first_same(runs(), same, count=len(images.hashes))


def first_similar(minima: NDArray[np.uint16], *, similarity: float) -> NDArray[np.int64]:
    """For each text (T, K) the index of an earlier one that is at least so similar, -1 if it has none: (T,).

    Texts that agree in all minima of some band are compared (locality-sensitive hashing). Bands are as long as
    possible while a pair at the threshold still becomes a candidate with probability _SURE.
    """
    enough = similarity * MINIMA

    def same(items: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.bool_]:
        return np.asarray(np.count_nonzero(minima[items] == minima[others], axis=1) >= enough)

    def runs() -> Iterator[_Runs]:
        length = max(r for r in range(1, MINIMA + 1) if 1 - (1 - similarity**r) ** (MINIMA // r) >= _SURE)
        for start in range(0, MINIMA - length + 1, length):
            keys = np.zeros(len(minima), np.uint64)
            for column in range(start, start + length):
                keys = mix(keys + minima[:, column])
            yield _runs_among(keys)

    return _first_same(runs(), same, count=len(minima))


def _first_same(tables: Iterator[_Runs], same: Same, *, count: int) -> NDArray[np.int64]:
    """Compare every item with the others of its run, first to last, until one is the same: (count,) indices or -1.

    Each copy in a cluster takes one comparison, with the cluster's first; memory is that of one table of runs.
    """
    matches = np.full(count, -1, np.int64)
    for runs in tables:
        step = 0
        waiting = np.flatnonzero((matches[runs.items] < 0) & (runs.first < runs.stop))
        while len(waiting) and step < _MOST:
            for start in range(0, len(waiting), _BLOCK):
                part = waiting[start : start + _BLOCK]
                items, others = runs.items[part], runs.order[runs.first[part] + step]
                is_same = same(items, others)
                matches[items[is_same]] = others[is_same]
            step += 1
            waiting = waiting[(matches[runs.items[waiting]] < 0) & (runs.first[waiting] + step < runs.stop[waiting])]
    return matches


def _runs_among(keys: NDArray[np.uint64]) -> _Runs:
    """Each item with the earlier items of its key."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    places = np.arange(len(keys))
    is_first = np.ones(len(keys), np.bool_)
    is_first[1:] = ordered[1:] != ordered[:-1]
    return _Runs(items=order, first=np.maximum.accumulate(np.where(is_first, places, 0)), stop=places, order=order)


def _runs_between(keys: NDArray[np.uint64], known: NDArray[np.uint64]) -> _Runs:
    """Each item with the known items of its key."""
    order = np.argsort(known, kind="stable")
    first, stop = (np.searchsorted(known[order], keys, side) for side in ("left", "right"))
    return _Runs(items=np.arange(len(keys)), first=first, stop=stop, order=order)


def _masks(bits: int) -> list[np.uint64]:
    """Masks, at least one of which hides all differences of two hashes that differ in at most `bits` bits.

    If the 64 bits are cut into m blocks, m - bits of them are equal (pigeonhole): one mask for each choice of those.
    """
    blocks = next(m for m in range(bits + 1, 65) if 64 * (m - bits) >= _KEY_BITS * m)
    edges = [64 * number // blocks for number in range(blocks + 1)]
    pieces = [(1 << stop) - (1 << start) for start, stop in pairwise(edges)]
    return [np.uint64(sum(chosen)) for chosen in combinations(pieces, blocks - bits)]
