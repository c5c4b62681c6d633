"""ANLS, the metric of DocVQA and InfographicVQA: average normalised Levenshtein similarity. Pure.

Biten et al., "Scene Text Visual Question Answering" (arXiv:1905.13648, equation 1). `official` is the script of the
Robust Reading Competition (rrc.cvc.uab.es), as Qwen-VL's `infographicsvqa_eval.py` and lmms-eval copy it.

The columns differ in two cases.

- A distance of exactly half the length: the script gives 0.5, the definition 0.
- The script compares texts in lower case with single spaces, but divides by the length of the texts as they came, in
  upper case. Spaces at the ends or doubled, and letters whose upper case is longer, raise the score. Corrected: the
  length of what is compared.
"""

from collections.abc import Sequence

from vila_ops.eval.metrics.columns import Columns

THRESHOLD = 0.5
"""A similarity below counts as 0."""


def score(answer: str, references: Sequence[str]) -> Columns:
    """The similarity of an answer to its nearest reference, from 0 to 1. Raises ValueError without references."""
    if not references:
        raise ValueError("a question without references cannot be scored; look at its annotation")
    official = 1 - min(_script_distance(answer, one) for one in references)
    corrected = 1 - min(_distance(answer, one) for one in references)
    return Columns(
        official=official if official >= THRESHOLD else 0.0,
        corrected=corrected if corrected > THRESHOLD else 0.0,
    )


def levenshtein(left: str, right: str) -> int:
    """The least number of characters to insert, remove or replace that makes one text of the other."""
    short, long = sorted((left, right), key=len)
    row = list(range(len(short) + 1))
    for number, character in enumerate(long, 1):
        above, row = row, [number]
        for place, other in enumerate(short):
            row.append(above[place] if other == character else 1 + min(above[place], above[place + 1], row[place]))
    return row[-1]


def relative_distance(left: str, right: str, length: int) -> float:
    """The Levenshtein distance by a length, 0 for none; a lower bound where the texts' lengths alone put it above half.

    So a very long answer is not compared with a short reference.
    """
    if not length:
        return 0.0
    if (least := abs(len(left) - len(right)) / length) > 1 - THRESHOLD:
        return least
    return levenshtein(left, right) / length


def _script_distance(answer: str, reference: str) -> float:
    length = max(len(answer.upper()), len(reference.upper()))
    return relative_distance(_single_spaced(answer), _single_spaced(reference), length)


def _distance(answer: str, reference: str) -> float:
    left, right = _single_spaced(answer), _single_spaced(reference)
    return relative_distance(left, right, max(len(left), len(right)))


def _single_spaced(text: str) -> str:
    return " ".join(text.strip().lower().split())
