"""The two columns of an official metric, and how this folder fills them. Pure.

`official` is the value of the official code, with its faults: published tables were made with it. `corrected` is the
value that the benchmark's own definition gives. Each module lists where the two differ. Where the official code fails
(a division by zero, an assertion), `official` has the corrected value, and the module says so.

Functions here score texts that a model wrote. A failed request has no text: the caller counts it by its policy and
never passes an error message as an answer.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Columns:
    """A score of one item, or of a set, in both columns."""

    official: float
    corrected: float


def mean(scores: Iterable[Columns]) -> Columns:
    """The mean of each column. Raises ValueError without scores."""
    columns = list(scores)
    if not columns:
        raise ValueError("the mean of no scores; give at least one item")
    return Columns(
        official=sum(score.official for score in columns) / len(columns),
        corrected=sum(score.corrected for score in columns) / len(columns),
    )


def right(official: bool, corrected: bool) -> Columns:
    """1 or 0 in each column."""
    return Columns(official=float(official), corrected=float(corrected))
