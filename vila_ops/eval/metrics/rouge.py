"""ROUGE-L of captions. Pure.

Lin, "ROUGE" (ACL workshop 2004), as computed by pycocoevalcap 1.2 in `rouge/rouge.py`: F with beta 1.2 of precision and
recall of the longest common subsequence.

The columns differ in two cases.

- The official code takes the highest precision over the references and the highest recall, which may be of two
  references. Corrected: the highest F of one reference.
- A caption without words is one empty word in the official code, which a reference without words matches. Corrected: 0.
"""

from collections.abc import Sequence

from vila_ops.eval.metrics.columns import Columns
from vila_ops.eval.metrics.ptb import Words

BETA = 1.2
"""Weight of recall against precision."""


def rouge_l(candidate: Words, references: Sequence[Words]) -> Columns:
    """ROUGE-L of a caption, from 0 to 1. Raises ValueError without references."""
    if not references:
        raise ValueError("a caption without references cannot be scored; look at its annotation")
    words = candidate or ("",)
    pairs = [_precision_and_recall(words, reference or ("",)) for reference in references]
    official = _f(max(precision for precision, _ in pairs), max(recall for _, recall in pairs))
    corrected = max(_f(*pair) for pair in pairs) if candidate else 0.0
    return Columns(official=official, corrected=corrected)


def _precision_and_recall(candidate: Words, reference: Words) -> tuple[float, float]:
    common = _longest_common(candidate, reference)
    return common / len(candidate), common / len(reference)


def _f(precision: float, recall: float) -> float:
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _longest_common(left: Words, right: Words) -> int:
    """Number of words of the longest common subsequence."""
    row = [0] * (len(right) + 1)
    for word in left:
        above, row = row, [0]
        for place, other in enumerate(right):
            row.append(above[place] + 1 if word == other else max(above[place + 1], row[place]))
    return row[-1]
