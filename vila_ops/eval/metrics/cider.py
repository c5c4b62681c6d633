"""CIDEr-D of captions. Pure.

Vedantam et al., "CIDEr: Consensus-based Image Description Evaluation" (arXiv:1411.5726), as computed by pycocoevalcap
1.2 in `cider/cider_scorer.py`, the library behind published tables.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vila_ops.eval.metrics.ptb import Words, tokenize

LONGEST_NGRAM = 4
"""In words; the n-grams of 1 to 4 words have equal weight."""
SIGMA = 6.0
"""Width of the penalty on a difference of length, in words."""
SCALE = 10.0
"""A candidate equal to its only reference scores 10 when every order of n-gram has a rare one."""

Ngram = tuple[str, ...]


@dataclass(frozen=True)
class Cider:
    """CIDEr-D on the library's own scale, 0 to 10; tables in percent (VILA's too) print 100 times this."""

    score: float
    """Mean of `items`."""
    items: dict[str, float]
    """By id, in the order of the references."""


@dataclass(frozen=True)
class _Vector:
    """A caption as tf-idf weights of its n-grams."""

    weights: tuple[dict[Ngram, float], ...]
    """One mapping for each order of n-gram, shortest first."""
    norms: tuple[float, ...]
    """Euclidean, one for each order."""
    bigrams: int
    """Number of bigrams with repeats, which the library takes for the length of a caption."""


def cider(candidates: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> Cider:
    """CIDEr-D of one caption for each id against one or more references, as plain text; see `cider_of_words`.

    The words are those of `ptb.tokenize`; `captions.caption_scores` takes those of the official tokenizer too.
    """
    return cider_of_words(
        {id_: tokenize(caption) for id_, caption in candidates.items()},
        {id_: [tokenize(caption) for caption in captions] for id_, captions in references.items()},
    )


def cider_of_words(candidates: Mapping[str, Words], references: Mapping[str, Sequence[Words]]) -> Cider:
    """CIDEr-D of captions that are split into words. Equal to pycocoevalcap's `Cider().compute_score` to 1e-9.

    Item = SCALE * mean over orders and references of exp(-d^2 / 2 SIGMA^2) * min(c, r) . r / |c| |r| with d the
    difference in bigrams (arXiv:1411.5726 equations 1, 4, 5 and section 7). idf is log(N / df) for N ids, of which df
    have the n-gram in any reference. The score of an item therefore depends on the other items: an n-gram that all ids
    share has weight 0, and a single id scores 0. A caption without words scores 0.
    Raises ValueError for ids that one argument lacks or that have no reference.
    """
    if candidates.keys() != references.keys():
        alone = sorted(candidates.keys() ^ references.keys())
        raise ValueError(f"candidates and references differ in {len(alone)} ids: {', '.join(alone[:5])}")
    if empty := [id_ for id_, captions in references.items() if not captions]:
        raise ValueError(f"no reference for {len(empty)} ids: {', '.join(empty[:5])}")
    if not references:
        raise ValueError("CIDEr of no captions; give at least one id")
    counts = {id_: [_ngrams(words) for words in captions] for id_, captions in references.items()}
    frequency = Counter(ngram for captions in counts.values() for ngram in set().union(*captions))
    log_ids = math.log(len(counts))
    idf = {ngram: log_ids - math.log(documents) for ngram, documents in frequency.items()}
    items = {}
    for id_, captions in counts.items():
        candidate = _vector(_ngrams(candidates[id_]), idf, unseen=log_ids)
        targets = [_vector(caption, idf, unseen=log_ids) for caption in captions]
        items[id_] = SCALE * sum(_similarity(candidate, target) for target in targets) / len(targets)
    return Cider(score=sum(items.values()) / len(items), items=items)


def _ngrams(words: Words) -> Counter[Ngram]:
    """Number of occurrences of each n-gram of 1 to LONGEST_NGRAM words."""
    return Counter(
        tuple(words[start : start + order])
        for order in range(1, LONGEST_NGRAM + 1)
        for start in range(len(words) - order + 1)
    )


def _vector(counts: Counter[Ngram], idf: Mapping[Ngram, float], *, unseen: float) -> _Vector:
    """Counts times idf; `unseen` is the idf of an n-gram in no reference."""
    weights: tuple[dict[Ngram, float], ...] = tuple({} for _ in range(LONGEST_NGRAM))
    for ngram, count in counts.items():
        weights[len(ngram) - 1][ngram] = count * idf.get(ngram, unseen)
    norms = tuple(math.sqrt(sum(weight * weight for weight in order.values())) for order in weights)
    return _Vector(weights, norms, bigrams=sum(count for ngram, count in counts.items() if len(ngram) == 2))


def _similarity(candidate: _Vector, reference: _Vector) -> float:
    """The mean over the orders of the clipped cosine, times the penalty on length, from 0 to 1."""
    total = 0.0
    norms = (left * right for left, right in zip(candidate.norms, reference.norms, strict=True))
    for ours, theirs, norm in zip(candidate.weights, reference.weights, norms, strict=True):
        if norm > 0:
            shared = [(weight, theirs[ngram]) for ngram, weight in ours.items() if ngram in theirs]
            total += sum(min(left, right) * right for left, right in shared) / norm
    delta = candidate.bigrams - reference.bigrams
    return total / LONGEST_NGRAM * math.exp(-(delta**2) / (2 * SIGMA**2))
