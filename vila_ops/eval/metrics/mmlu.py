"""Scores of MMLU as by its official `evaluate.py`. Pure.

Hendrycks et al., "Measuring Massive Multitask Language Understanding" (arXiv:2009.03300); hendrycks/test at 4450500.
The answer is the letter with the highest likelihood after "Answer:". The official total is the mean over all questions
(micro); papers also print the mean over subjects (macro): both are named here.

The columns differ where letters share the highest likelihood: the official code takes the first of them, so that a
model with equal likelihoods scores the share of A. Corrected: 1 / k for k letters that share it
(`choice.share_right`).
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from vila_ops.eval.metrics.choice import share_right
from vila_ops.eval.metrics.columns import Columns, mean


@dataclass(frozen=True)
class MmluScores:
    """The accuracies of a set, from 0 to 1."""

    micro: Columns
    """Mean over all questions: the official total."""
    macro: Columns
    """Mean over the subjects."""
    subjects: dict[str, Columns]


def score(likelihoods: Sequence[float], truth: int, *, item: str) -> Columns:
    """The score of a question, from 0 to 1, by the log-likelihoods of its letters and the number of the right one.

    Raises ValueError, with the item's name, for a NaN or a truth that is none of the letters.
    """
    if not 0 <= truth < len(likelihoods):
        raise ValueError(f"item {item!r}: the right option is number {truth} of {len(likelihoods)}; count from 0")
    if any(math.isnan(one) for one in likelihoods):
        raise ValueError(f"item {item!r} has a likelihood that is NaN; look for an overflow in the model")
    others = [one for number, one in enumerate(likelihoods) if number != truth]
    return Columns(
        official=float(list(likelihoods).index(max(likelihoods)) == truth),
        corrected=share_right([likelihoods[truth], *others], item=item),
    )


def mmlu(scores: Sequence[tuple[str, Columns]]) -> MmluScores:
    """The accuracies of questions given as pairs of a subject and a score. Raises ValueError without questions."""
    by_subject: dict[str, list[Columns]] = defaultdict(list)
    for subject, one in scores:
        by_subject[subject].append(one)
    subjects = {subject: mean(ones) for subject, ones in by_subject.items()}
    return MmluScores(micro=mean(one for _, one in scores), macro=mean(subjects.values()), subjects=subjects)
