"""Scores of ScienceQA as by LLaVA's `eval_science_qa.py`. Pure.

Lu et al., "Learn to Explain" (arXiv:2209.09513). Tables of LLaVA and VILA print the accuracy on the questions with an
image ("SQA-I", the IMG subset). The authors' own script draws an option at random where it cannot read an answer;
LLaVA's, which is the official column here, counts it as wrong.

The columns differ in three cases.

- LLaVA's script finds questions with an image by the placeholder in the prompt of an answer, so that a question without
  an answer leaves the IMG subset. Corrected: it stays, and is wrong.
- LLaVA's script reads an answer that is a letter, begins with "B. ", or has "The answer is B" once with one more
  character behind it. It does not read "B.", "(B)" or "the answer is B". Corrected: `letters.corrected_letter`.
- "The answer is Because" is B in LLaVA's script.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from vila_ops.eval.metrics.columns import Columns, mean, right
from vila_ops.eval.metrics.letters import corrected_letter

LETTERS = "ABCDE"

_STATED = re.compile(r"The answer is ([A-Z]).")


@dataclass(frozen=True)
class Problem:
    """A question of ScienceQA."""

    choices: tuple[str, ...]
    answer: int
    """Number of the right choice, from 0."""
    has_image: bool


@dataclass(frozen=True)
class ScienceQaScores:
    """The accuracies of a set, from 0 to 1."""

    items: dict[str, Columns]
    accuracy: Columns
    image_accuracy: Columns | None
    """Of the questions with an image; None without one, or where none of them is answered."""


def official_letter(text: str) -> str | None:
    """Read an answer as LLaVA's script does."""
    if text in tuple(LETTERS):
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    stated: list[str] = _STATED.findall(text)
    return stated[0] if len(stated) == 1 else None


def score(problem: Problem, answer: str | None) -> Columns:
    """1 where the answer is right, else 0; None is no answer, which is wrong."""
    if answer is None:
        return right(False, False)
    truth = LETTERS[problem.answer]
    options = dict(zip(LETTERS, problem.choices, strict=False))
    return right(official_letter(answer) == truth, corrected_letter(answer, options) == truth)


def scienceqa(problems: Mapping[str, Problem], answers: Mapping[str, str]) -> ScienceQaScores:
    """The accuracies for problems and answers by id. Raises ValueError for no problems, or for answers to others."""
    if foreign := sorted(answers.keys() - problems.keys()):
        raise ValueError(f"{len(foreign)} answers are to none of the problems: {', '.join(foreign[:5])}")
    items = {id_: score(problem, answers.get(id_)) for id_, problem in problems.items()}
    with_image = [id_ for id_, problem in problems.items() if problem.has_image]
    answered = [id_ for id_ in with_image if id_ in answers]
    return ScienceQaScores(
        items=items,
        accuracy=mean(items.values()),
        image_accuracy=Columns(
            official=sum(items[id_].official for id_ in answered) / len(answered),
            corrected=sum(items[id_].corrected for id_ in with_image) / len(with_image),
        )
        if answered
        else None,
    )
