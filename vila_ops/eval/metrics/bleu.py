"""BLEU of captions, in orders 1 to 4. Pure.

Papineni et al., "BLEU" (ACL 2002), as computed by pycocoevalcap 1.2 in `bleu/bleu_scorer.py`: counts are summed over
the set before they are divided, and each caption's nearest reference by length (the shorter of two) counts for the
brevity. Small constants stand against a division by zero, so that a set without a common 4-gram scores nearly 0 and
not 0. There is no corrected column.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vila_ops.eval.metrics.ptb import Words
from vila_ops.eval.statistics import FloatArray

ORDERS = 4
_TINY, _SMALL = 1e-15, 1e-9


@dataclass(frozen=True)
class Bleu:
    """BLEU-1 to BLEU-4, from 0 to 1."""

    scores: tuple[float, ...]
    """Of the whole set, which is not the mean of the items."""
    items: dict[str, tuple[float, ...]]
    """By id, each as a set of its own."""
    counts: dict[str, tuple[int, ...]]
    """By id: n-grams in common with the references and n-grams, of each order; words, and words of the nearest
    reference. `bleu_4` reads their sums over a set."""


@dataclass(frozen=True)
class _Counts:
    """What the captions of one or more ids have in common with their references, by order."""

    right: tuple[int, ...]
    guessed: tuple[int, ...]
    length: int
    reference_length: int


def bleu_of_words(candidates: Mapping[str, Words], references: Mapping[str, Sequence[Words]]) -> Bleu:
    """BLEU of captions that are split into words. Equal to pycocoevalcap's `Bleu(4).compute_score` to 1e-9.

    Raises ValueError for ids that one argument lacks or that have no reference.
    """
    if candidates.keys() != references.keys() or not all(references.values()) or not references:
        raise ValueError(f"{len(candidates)} captions for {len(references)} ids; give each id one and its references")
    counts = {id_: _counts(candidates[id_], captions) for id_, captions in references.items()}
    return Bleu(
        scores=_scores(_sum(list(counts.values()))),
        items={id_: _scores(one) for id_, one in counts.items()},
        counts={id_: (*one.right, *one.guessed, one.length, one.reference_length) for id_, one in counts.items()},
    )


def bleu_4(sums: FloatArray) -> FloatArray:
    """BLEU-4 of sets from the sums of their counts: (..., 10) -> (...)."""
    right, guessed = sums[..., :ORDERS], sums[..., ORDERS : 2 * ORDERS]
    ratio = (sums[..., -2] + _TINY) / (sums[..., -1] + _SMALL)
    brevity = np.exp(np.minimum(0, 1 - 1 / ratio))
    scores: FloatArray = ((right + _TINY) / (guessed + _SMALL)).prod(axis=-1) ** (1 / ORDERS) * brevity
    return scores


def _counts(candidate: Words, references: Sequence[Words]) -> _Counts:
    most: Counter[tuple[str, ...]] = Counter()
    for reference in references:
        most |= _ngrams(reference)
    right = [0] * ORDERS
    for ngram, times in _ngrams(candidate).items():
        right[len(ngram) - 1] += min(times, most[ngram])
    length = len(candidate)
    return _Counts(
        right=tuple(right),
        guessed=tuple(max(0, length - order) for order in range(ORDERS)),
        length=length,
        reference_length=min((abs(len(one) - length), len(one)) for one in references)[1],
    )


def _ngrams(words: Words) -> Counter[tuple[str, ...]]:
    return Counter(
        tuple(words[start : start + order]) for order in range(1, ORDERS + 1) for start in range(len(words) - order + 1)
    )


def _sum(counts: Sequence[_Counts]) -> _Counts:
    return _Counts(
        right=tuple(map(sum, zip(*(one.right for one in counts), strict=True))),
        guessed=tuple(map(sum, zip(*(one.guessed for one in counts), strict=True))),
        length=sum(one.length for one in counts),
        reference_length=sum(one.reference_length for one in counts),
    )


def _scores(counts: _Counts) -> tuple[float, ...]:
    ratio = (counts.length + _TINY) / (counts.reference_length + _SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, scores = 1.0, []
    for order, (right, guessed) in enumerate(zip(counts.right, counts.guessed, strict=True), 1):
        product *= (right + _TINY) / (guessed + _SMALL)
        scores.append(product ** (1 / order) * brevity)
    return tuple(scores)
