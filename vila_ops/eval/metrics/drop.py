"""Scores of DROP as by its official `drop_eval.py`: exact match and F1 over aligned spans. Pure.

Dua et al., "DROP" (arXiv:1903.00161); allennlp-reading-comprehension at 14fc0a4, which lm-evaluation-harness copies.
An answer is one or more spans, a span a set of words. Spans are aligned one to one so that the sum of their F1 is
highest, and a pair has an F1 only if a number of the true span, where it has any, is in the answer. An answer takes
the best score over the true answers.

The columns differ in four cases.

- The official code splits words at spaces and hyphens alone, so that "10\\n\\nPassage" is one word. Corrected: at all
  white space.
- A word with a mark loses it before it is read as a number, so that "$12.50" is 1250. Corrected: currency and percent
  signs, brackets and thousands separators are removed first.
- "nan", "inf" and "1_000" are numbers in the official code.
- F1 is rounded to two decimals for each item, and spans match exactly as sets with equal lengths: (a, a, b) is (a, b,
  b). Corrected: F1 is not rounded, and equal spans have to occur equally often.

How a model's text becomes spans is not part of the metric; a stop at "." would cut decimals
(lm-evaluation-harness#2137).
"""

import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vila_ops.eval.metrics.columns import Columns

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?")
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_AROUND_NUMBERS = "$€£%()[]{}\"'!?,;:"


@dataclass(frozen=True)
class DropScores:
    """The scores of one question, each from 0 to 1."""

    exact_match: Columns
    f1: Columns


@dataclass(frozen=True)
class _Rule:
    """How a column reads words."""

    split: re.Pattern[str]
    number: Callable[[str], float | None]


def true_spans(answer: Mapping[str, Any]) -> tuple[str, ...]:
    """The spans of an `answer` or `validated_answers` record: a number, spans or a date. Raises ValueError for none."""
    if answer.get("number"):
        return (str(answer["number"]),)
    if answer.get("spans"):
        return tuple(answer["spans"])
    if "date" in answer:
        return (" ".join(str(answer["date"][part]) for part in ("day", "month", "year")),)
    raise ValueError(f"the keys of an answer are {', '.join(sorted(answer)) or 'none'}; give a number, spans or a date")


def score(spans: Sequence[str], truths: Sequence[Sequence[str]]) -> DropScores:
    """The best scores of an answer's spans over the true answers. Raises ValueError without spans or true answers.

    A true answer whose first span is blank counts for nothing, as in the official code.
    """
    if not spans or not truths or not all(truths):
        raise ValueError(f"{len(spans)} spans for {len(truths)} true answers; give at least one span in each")
    counting = [truth for truth in truths if truth[0].strip()]
    official = [_compare(spans, truth, _OFFICIAL) for truth in counting]
    corrected = [_compare(spans, truth, _CORRECTED) for truth in counting]
    return DropScores(
        exact_match=Columns(
            official=float(any(set(one.given) == set(one.true) and len(spans) == len(one.true) for one in official)),
            corrected=float(any(sorted(one.given) == sorted(one.true) for one in corrected)),
        ),
        f1=Columns(
            official=max((float(round(one.aligned.mean(), 2)) for one in official), default=0.0),
            corrected=max((float(one.aligned.mean()) for one in corrected), default=0.0),
        ),
    )


@dataclass(frozen=True)
class _Comparison:
    """The normalised spans of an answer and of a true one, and the F1 of their aligned pairs."""

    given: list[str]
    true: list[str]
    aligned: NDArray[np.float64]


def _compare(spans: Sequence[str], truth: Sequence[str], rule: _Rule) -> _Comparison:
    given = [_normalize(span, rule) for span in spans]
    true = [_normalize(span, rule) for span in truth]
    aligned = _aligned([set(one.split()) for one in given], [set(one.split()) for one in true], rule)
    return _Comparison(given, true, aligned)


def _aligned(given: Sequence[set[str]], true: Sequence[set[str]], rule: _Rule) -> NDArray[np.float64]:
    """The F1 of each aligned pair, in the order of the true spans, and 0 for each span that is left over."""
    from scipy.optimize import linear_sum_assignment  # slow to import

    scores = np.array([[_f1(one, truth, rule) for one in given] for truth in true])
    rows, columns = linear_sum_assignment(-scores)
    aligned = np.zeros(max(len(given), len(true)))
    aligned[rows] = scores[rows, columns]
    return aligned


def _f1(given: set[str], true: set[str], rule: _Rule) -> float:
    if not _numbers_agree(given, true, rule):
        return 0.0
    shared = len(given & true)
    precision = shared / len(given) if given else 1.0
    recall = shared / len(true) if true else 1.0
    return 2 * precision * recall / (precision + recall) if precision or recall else 0.0


def _numbers_agree(given: set[str], true: set[str], rule: _Rule) -> bool:
    numbers = {word for word in true if rule.number(word) is not None}
    return not numbers or not numbers.isdisjoint(given)


def _normalize(span: str, rule: _Rule) -> str:
    words = [_ARTICLES.sub(" ", _word(word, rule)).split() for word in rule.split.split(span.lower())]
    return " ".join(part for parts in words for part in parts)


def _word(word: str, rule: _Rule) -> str:
    """A number as Python writes it, or a word without marks, which may then be a number."""
    if rule.number(word) is None:
        word = "".join(character for character in word if character not in _PUNCTUATION)
    return word if (value := rule.number(word)) is None else str(value)


def _python_number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _plain_number(word: str) -> float | None:
    bare = word.lstrip(_AROUND_NUMBERS).rstrip(_AROUND_NUMBERS + ".")
    if _THOUSANDS.fullmatch(bare):
        bare = bare.replace(",", "")
    return float(bare) if _NUMBER.fullmatch(bare) else None


_OFFICIAL = _Rule(re.compile(r"[ -]"), _python_number)
_CORRECTED = _Rule(re.compile(r"[\s-]"), _plain_number)
