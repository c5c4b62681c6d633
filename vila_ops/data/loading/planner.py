"""Sequence packing: every sample in exactly one row, never split, with rows nearly full. Pure.

Samples are distributed in random order to blocks, and each block is planned on its own: time is linear, memory is that
of the result and of one block. In a block, rows are opened with random samples until about two more fit; exact fits are
then looked up in the histograms of free tokens and of lengths, for all rows at once. Rows that cannot be filled to the
last token are dissolved, and their samples are tried again in the next round; samples left after the last round are
placed best-fit decreasing. If best-fit decreasing alone needs fewer rows, as with many samples nearly as long as a row,
it is used instead. Only integers are used: the same samples and seed give the same rows on any machine.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PLAN_REVISION = 1
"""Raised if the same lengths and seed give other rows."""
BLOCK = 2**22
"""Samples planned at once: the searches take the same time for any number, and more samples have more exact fits."""
ROUNDS = 6
"""After six rounds 0.06 % of rows of 4096 tokens are empty (after three 0.12 %); more rounds gain little."""
TRIAL = 2**17
"""Samples of a trial that decides, for larger plans, between rounds of exact fits and best-fit decreasing alone."""
REACH = 2048
"""Largest distance of the two samples that complete a row from their mean; bounds the search for long rows."""
FRUITLESS = 64
"""The search ends after so many consecutive differences without a pair; few samples have few exact pairs."""

Integers = NDArray[np.integer]
Ids = NDArray[np.int32]
NONE = np.empty(0, np.int64)


@dataclass(frozen=True)
class PackingPlan:
    """R rows of N samples."""

    starts: NDArray[np.int64]
    """(R + 1,): row r holds members[starts[r] : starts[r + 1]]."""
    members: NDArray[np.uint32]
    """(N,): numbers of samples."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, number: int) -> NDArray[np.uint32]:
        """The samples of a row."""
        return self.members[self.starts[number] : self.starts[number + 1]]


def one_each(draws: NDArray[np.uint32], *, seed: Sequence[int]) -> PackingPlan:
    """A plan with one row for each draw, in random order."""
    members = np.array(draws, np.uint32)
    np.random.default_rng(list(seed)).shuffle(members)
    return PackingPlan(np.arange(len(members) + 1, dtype=np.int64), members)


def plan(
    lengths: Integers, *, capacity: int, seed: Sequence[int], draws: NDArray[np.uint32] | None = None
) -> PackingPlan:
    """Rows of at most `capacity` tokens that contain every draw exactly once, in random order.

    `lengths` are the numbers of tokens of the samples, `draws` the samples to place, with repeats; None places each
    sample once.
    Raises ValueError for a sample without tokens, or with more than `capacity`.
    """
    if len(lengths) > 2**32:
        raise ValueError(f"{len(lengths)} samples; a plan numbers 2**32 at most: plan them in parts")
    draw = np.random.default_rng(list(seed))
    members = np.arange(len(lengths), dtype=np.uint32) if draws is None else np.array(draws, np.uint32)
    draw.shuffle(members)
    sizes: list[NDArray[np.uint32]] = []  # samples in each row, block by block
    num_blocks = max(1, -(-len(members) // BLOCK))
    edges = [len(members) * block // num_blocks for block in range(num_blocks + 1)]
    rounds: tuple[int, ...] = (ROUNDS, 0)
    if len(members) > TRIAL:
        rounds = (_fewest_rows(lengths[members[:TRIAL]], capacity, draw, rounds).rounds,)
    for start, stop in itertools.pairwise(edges):
        samples = members[start:stop]
        drawn = lengths[samples]
        _check(samples, drawn, capacity)
        block = _fewest_rows(drawn, capacity, draw, rounds)
        row_of = draw.permutation(block.num_rows).astype(np.uint32)[block.row_of]
        members[start:stop] = samples[_by_row(row_of)]
        sizes.append(np.bincount(row_of).astype(np.uint32))
    starts = np.zeros(1 + sum(map(len, sizes)), np.int64)
    np.cumsum(np.concatenate(sizes), out=starts[1:])
    return PackingPlan(starts, members)


def _fewest_rows(lengths: Integers, capacity: int, draw: np.random.Generator, rounds: tuple[int, ...]) -> "_Block":
    """The block with the fewest rows among plans with these numbers of rounds."""
    return min((_Block(lengths, capacity, draw, number) for number in rounds), key=lambda block: block.num_rows)


class _Block:
    """The rows of one block of n samples, which are in random order."""

    def __init__(self, lengths: Integers, capacity: int, draw: np.random.Generator, rounds: int) -> None:
        self.lengths = lengths.astype(np.int32)
        self.capacity = capacity
        self.rounds = rounds
        self.row_of = np.full(len(lengths), -1, np.int32)
        """The row of each sample (n,), numbered from 0."""
        self.num_rows = 0
        left = np.arange(len(lengths), dtype=np.int32)
        for _ in range(rounds):
            self._fill(left)
            before, left = len(left), left[self.row_of[left] < 0]
            if len(left) == before:
                break
            left = draw.permutation(left)
        self._best_fit(left)

    def _fill(self, samples: Ids) -> None:
        """Form completely full rows from samples in random order."""
        opened, free = self._open(samples)
        pool = samples[opened < 0]
        rows = _Groups(np.arange(len(free), dtype=np.int32), free, self.capacity)
        items = _Groups(pool, self.lengths[pool], self.capacity)
        full = rows.take_all(0)
        paired, first, second = _pairs(rows, items)
        filled, single = _singles(rows, items)
        number = np.full(len(free) + 1, -1, np.int32)  # the last element is for "no row"
        done = np.concatenate([full, paired, filled])
        number[done] = np.arange(self.num_rows, self.num_rows + len(done))
        self.num_rows += len(done)
        self.row_of[samples] = number[opened]
        self.row_of[first] = self.row_of[second] = number[paired]
        self.row_of[single] = number[filled]

    def _open(self, samples: Ids) -> tuple[Ids, Ids]:
        """Open as many rows as the tokens fill, each with samples until about two more fit.

        Returns the row of each sample, -1 if it has none, and the free tokens of each row.
        """
        lengths = self.lengths[samples]
        total = int(lengths.sum(dtype=np.int64))
        free = np.full(total // self.capacity, self.capacity, np.int32)
        row_of = np.full(len(samples), -1, np.int32)
        open_rows = np.arange(len(free), dtype=np.int32)
        start = 0
        while len(open_rows) and start < len(samples):
            dealt = slice(start, start + len(open_rows))
            start += len(open_rows)
            rows = open_rows[: len(lengths[dealt])]
            fits = lengths[dealt] <= free[rows]
            row_of[dealt] = np.where(fits, rows, -1)
            rows = rows[fits]
            free[rows] -= lengths[dealt][fits]
            open_rows = rows[free[rows].astype(np.int64) * len(samples) > total * 5 // 2]  # 2.5 means are free
        return row_of, free

    def _best_fit(self, samples: Ids) -> None:
        """Place samples best-fit decreasing, all samples of a length and all rows with the same free tokens at once."""
        items = _Groups(samples, self.lengths[samples], self.capacity)
        by_free = [np.empty(0, np.int32)] * (self.capacity + 1)
        some = np.zeros(self.capacity + 1, np.bool_)
        for length in np.flatnonzero(items.count)[::-1].tolist():
            left = items.take_all(length)
            while len(left):
                free = length + int(some[length:].argmax())
                if not some[free]:
                    free, opened = self.capacity, -(-len(left) // (self.capacity // length))
                    by_free[free] = np.arange(self.num_rows, self.num_rows + opened, dtype=np.int32)
                    self.num_rows += opened
                rows, by_free[free] = np.split(by_free[free], [len(left)])
                self.row_of[left[: len(rows)]] = rows
                left = left[len(rows) :]
                by_free[free - length] = np.concatenate([by_free[free - length], rows])
                some[free], some[free - length] = len(by_free[free]) > 0, True


class _Groups:
    """Ids grouped by a value in 0 .. limit; each id can be taken once."""

    def __init__(self, ids: Ids, values: Integers, limit: int) -> None:
        self._ids = ids[_stable_order(values, limit)]
        self.count = np.bincount(values, minlength=limit + 1)
        """Number of ids left for each value."""
        self._ends = np.cumsum(self.count)

    def take(self, values: Integers, counts: Integers) -> Integers:
        """Take `counts` ids of each of the distinct `values`; returns places for `at`."""
        places = self._ends[values] - self.count[values]
        self.count[values] -= counts
        return places

    def take_all(self, value: int) -> Ids:
        """Take all ids that are left for a value."""
        start, self.count[value] = self._ends[value] - self.count[value], 0
        return self._ids[start : self._ends[value]]

    def at(self, places: Integers, counts: Integers) -> Ids:
        """The ids at the places that `take` returned."""
        firsts = np.repeat(places - (np.cumsum(counts) - counts), counts)
        return self._ids[firsts + np.arange(len(firsts))]


def _pairs(rows: _Groups, items: _Groups) -> tuple[Ids, Ids, Ids]:
    """Rows, and for each the two items that fill it exactly, with lengths as equal as possible."""
    pairs: list[tuple[Integers, ...]] = [(NONE, NONE, NONE, NONE)]
    free = np.flatnonzero(rows.count)
    fruitless = 0
    for offset in range(REACH):
        # Rows of one parity never compete for the same smaller item or the same larger item.
        apart = [_pairs_apart(offset, free[free % 2 == parity], rows, items) for parity in (0, 1)]
        some = [part for part in apart if len(part[0])]
        pairs += some
        fruitless = 0 if some else fruitless + 1
        free = free[rows.count[free] > 0]
        if not len(free) or fruitless == FRUITLESS:
            break
    row, small, large, count = (np.concatenate(column) for column in zip(*pairs, strict=True))
    return rows.at(row, count), items.at(small, count), items.at(large, count)


def _pairs_apart(offset: int, free: Integers, rows: _Groups, items: _Groups) -> tuple[Integers, ...]:
    """Places of rows, of smaller and of larger items, and their counts, for lengths at this offset from their mean."""
    small = free // 2 - offset
    inside = (small > 0) & (free - small < len(items.count))
    free, small = free[inside], small[inside]
    large = free - small
    count = np.minimum(np.minimum(items.count[small], items.count[large]), rows.count[free])
    some = np.flatnonzero(count)
    free, small, large, count = free[some], small[some], large[some], count[some]
    # Where one row's smaller item is as long as another's larger one, each gets half of what is there.
    wanted = np.bincount(np.concatenate([small, large]), minlength=1)
    shared = (wanted[small] > 1) | (wanted[large] > 1)
    if shared.any():
        halves = np.minimum(items.count[small], items.count[large]) // 2
        count[shared] = np.minimum(count[shared], halves[shared])
        some = np.flatnonzero(count)
        free, small, large, count = free[some], small[some], large[some], count[some]
    return rows.take(free, count), items.take(small, count), items.take(large, count), count


def _singles(rows: _Groups, items: _Groups) -> tuple[Ids, Ids]:
    """Rows (by free tokens), and for each the item (by length) that fills it."""
    count = np.minimum(rows.count, items.count)
    values = np.flatnonzero(count)
    count = count[values]
    return rows.at(rows.take(values, count), count), items.at(items.take(values, count), count)


def _stable_order(values: Integers, limit: int) -> Integers:
    """Where the values stand in ascending order, equal ones in theirs."""
    return np.argsort(values.astype(np.uint16 if limit < 2**16 else np.uint32), kind="stable")  # of 16 bits: linear


def _by_row(row_of: NDArray[np.uint32]) -> Integers:
    """The samples row by row, in a row in their order; two passes over 16 bits, so that time is linear."""
    low = np.argsort(row_of.astype(np.uint16), kind="stable")
    return low[np.argsort((row_of >> 16).astype(np.uint16)[low], kind="stable")]


def _check(samples: NDArray[np.uint32], lengths: Integers, capacity: int) -> None:
    wrong = np.flatnonzero((lengths < 1) | (lengths > capacity))[:1]
    for sample, length in zip(samples[wrong], lengths[wrong], strict=True):
        if length < 1:
            raise ValueError(f"sample {sample} has {length} tokens; a sample has at least one")
        raise ValueError(f"sample {sample} has {length} tokens, a row holds {capacity}; raise sequence_length")
