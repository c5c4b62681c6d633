"""Scores of VizWiz: the accuracy of answers, and the recognition of questions that cannot be answered. Pure.

Gurari et al., "VizWiz Grand Challenge" (arXiv:1802.08218); `vqaEval.py` of the VizWiz API, which differs from that of
VQAv2 (`vqa`) in three cases. Its tables print shares in percent with two decimals; here they are not rounded.

The accuracies differ as follows.

- The official code normalises the model's answer alone and compares it with the human answers as they are in the file,
  so that no model's answer equals "2 dogs." or "the beach". Corrected: both sides, by `vqa.CORRECTED`.
- The official list of contractions has typographic apostrophes in most words, so that "dont" becomes "don’t", which
  equals no human "don't". Corrected: plain ones, and a typographic one in an answer is made plain.
- More than 32 dots and answers of articles alone, as in `vqa`.

Both leave one person out by position.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vila_ops.eval.metrics.columns import Columns
from vila_ops.eval.metrics.vqa import CONTRACTIONS, CORRECTED, Normalizer, clean, leave_one_out

_PLAIN = frozenset(("ain't", "aren't", "can't", "could've", "couldn't", "we've", "where's", "who've"))
"""Contractions that have a plain apostrophe in the official list."""
_PLAIN_KEYS = frozenset(("couldn'tve", "hadn'tve"))
_OFFICIAL = Normalizer(
    {
        word if word in _PLAIN_KEYS else word.replace("'", "’"): full if full in _PLAIN else full.replace("'", "’")
        for word, full in CONTRACTIONS.items()
    },
    max_dots=32,
    keeps_lone_articles=False,
)

UNANSWERABLE = "unanswerable"


@dataclass(frozen=True)
class Unanswerability:
    """How well a model recognises the questions that cannot be answered, each number from 0 to 1."""

    average_precision: float
    """Of the questions ordered by the model's score; 0 where all can be answered."""
    f1: float
    """Of the questions with a score of answerability below 0.5; 0 where none is recognised."""


def score(answer: str, human: Sequence[str]) -> Columns:
    """The accuracy of an answer, from 0 to 1. Raises ValueError for a question without human answers."""
    return Columns(
        official=leave_one_out(_OFFICIAL(answer), human),
        corrected=leave_one_out(_plain(answer), [_plain(one) for one in human]),
    )


def says_unanswerable(answer: str) -> bool:
    """Whether an answer is the word that the prompt offers for questions that cannot be answered."""
    return CORRECTED(answer) == UNANSWERABLE


def unanswerability(answerable: Sequence[bool], scores: Sequence[float]) -> Unanswerability:
    """Numbers of `evaluate_unanswerability` for questions that can be answered, or not, and the model's scores for it.

    `scores` are from 0 to 1; for a model that only writes answers they are 0 where `says_unanswerable`, else 1.
    Average precision is the sum of precision times the step of recall over the distinct scores (scikit-learn's rule).
    Raises ValueError for no questions, other numbers of both, or a score outside of 0 to 1.
    """
    if not answerable or len(answerable) != len(scores):
        raise ValueError(f"{len(answerable)} questions and {len(scores)} scores; give one score for each question")
    values = 1 - np.asarray(scores, dtype=np.float64)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"a score of answerability is outside of 0 to 1; the lowest is {min(scores)}")
    positive = ~np.asarray(answerable, dtype=bool)
    order = np.argsort(-values, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(values[order])), len(values) - 1)  # the last of each distinct score
    hits = np.cumsum(positive[order])[ends]
    total = int(positive.sum())
    steps = np.diff(hits, prepend=0) / total if total else np.zeros(len(hits))
    said = values > 0.5
    both = int((said & positive).sum())
    return Unanswerability(
        average_precision=float((steps * hits / (ends + 1)).sum()),
        f1=2 * both / (int(said.sum()) + total) if both else 0.0,
    )


def _plain(text: str) -> str:
    return CORRECTED(clean(text).replace("’", "'"))
