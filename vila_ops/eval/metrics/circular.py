"""Circular evaluation of MMBench: a question counts as right only if it is right in every order of its options. Pure.

Liu et al., "MMBench" (arXiv:2307.06281); `mcq_circular_eval` of VLMEvalKit (ms-vlmeval 0.0.20) without a judge. A
question with N options is asked N times, its options rotated; a file's row has the question's index plus a million for
each rotation.

The columns differ in three cases.

- The official code tests the rotations that are there, so that a missing one raises the score. Corrected: the question
  is incomplete, and not right.
- The official code drops a question whose first row is missing, with all its rotations. Corrected: incomplete.
- Letters are read by `letters.vlmeval_letter` and `letters.corrected_letter`.

With a judge that fails, the official code draws a letter at random; here a letter that cannot be read is wrong.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vila_ops.eval.metrics.letters import Options, corrected_letter, vlmeval_letter

STRIDE = 1_000_000
"""What a rotation adds to the index of its question."""

Outcome = Literal["right", "wrong", "incomplete"]


@dataclass(frozen=True)
class Rotation:
    """A row: a question with its options in one order, and the model's answer."""

    index: int
    truth: str
    """Letter of the right option in this order."""
    options: Options
    answer: str | None
    """None where the request failed, which is a missing rotation."""


@dataclass(frozen=True)
class CircularResult:
    """The result of one question."""

    official: float | None
    """1 where all rotations that are there are right, else 0; None where the official code drops the question."""
    outcome: Outcome
    """incomplete: a rotation is missing and none is wrong."""
    missing: tuple[int, ...]
    """Numbers of the rotations without an answer."""

    @property
    def corrected(self) -> float:
        """1 where every rotation is there and right, else 0."""
        return float(self.outcome == "right")


def circular(rotations: Sequence[Rotation]) -> dict[int, CircularResult]:
    """The results by the index of the question.

    Raises ValueError for an index that occurs twice, for rotations of a question with different numbers of options, and
    for a rotation beyond that number.
    """
    if doubled := [index for index, times in Counter(row.index for row in rotations).items() if times > 1]:
        raise ValueError(f"{len(doubled)} rows occur more than once, such as index {doubled[0]}")
    groups: dict[int, dict[int, Rotation]] = defaultdict(dict)
    for row in rotations:
        groups[row.index % STRIDE][row.index // STRIDE] = row
    return {index: _result(index, group) for index, group in groups.items()}


def _result(index: int, group: dict[int, Rotation]) -> CircularResult:
    sizes = {len(row.options) for row in group.values()}
    if len(sizes) != 1:
        raise ValueError(f"the rotations of question {index} have {sorted(sizes)} options; all must have as many")
    size = sizes.pop()
    if max(group) >= size:
        raise ValueError(f"question {index} has {size} options and a rotation {max(group)}; rotations count from 0")
    answered = {number: row for number, row in group.items() if row.answer is not None}
    missing = tuple(number for number in range(size) if number not in answered)
    wrong = any(corrected_letter(row.answer or "", row.options) != row.truth for row in answered.values())
    official = [vlmeval_letter(row.answer or "", row.options) == row.truth for row in answered.values()]
    return CircularResult(
        official=float(all(official)) if 0 in answered else None,
        outcome="wrong" if wrong else "incomplete" if missing else "right",
        missing=missing,
    )
