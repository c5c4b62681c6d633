"""Scores of GQA as by its official `eval.py`. Pure.

Hudson and Manning, "GQA" (arXiv:1902.09506). The script compares a prediction with the answer as texts; LLaVA first
brings it to lower case without dots at its end (`prediction`). Only balanced questions count. The score of attention
maps (grounding) is not here.

The columns differ in one case: LLaVA's step keeps spaces and line ends around the text, so that "Yes. " is not "yes".
Corrected: they are removed.

Without a file of choices (there is none for testdev) the script prints a validity and a plausibility of 0; here they
are None. The script fails for questions without a global group; the distribution is None there.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vila_ops.eval.metrics.columns import Columns, mean, right

Question = Mapping[str, Any]
"""A question of the official file: answer, isBalanced, types, groups, entailed."""
Choices = Mapping[str, Mapping[str, Any]]
"""By the question's id, the lists `valid` and `plausible` of the official file."""

_COMMON = ("color", "material", "shape")
"""The valid and plausible answers of questions that ask what two things have in common."""


@dataclass(frozen=True)
class GqaScores:
    """The numbers of the script, from 0 to 1 but the distribution."""

    items: dict[str, Columns]
    """By id, of the balanced questions."""
    accuracy: Columns
    binary: Columns | None
    """Of the questions that are not open; None without one."""
    open: Columns | None
    consistency: float | None
    """The mean accuracy on the questions that a right answer entails; None where no question entails another."""
    validity: float | None
    plausibility: float | None
    distribution: float | None
    """A hundredth of the chi-square distance of answers from the true ones by group; lower is better."""


def prediction(text: str) -> str:
    """An answer as LLaVA writes it into the file of predictions."""
    return text.rstrip(".").lower()


def score(answer: str, question: Question) -> Columns:
    """1 where an answer equals that of the question, else 0."""
    return right(prediction(answer) == question["answer"], prediction(answer.strip()).strip() == question["answer"])


def gqa(questions: Mapping[str, Question], answers: Mapping[str, str], choices: Choices | None = None) -> GqaScores:
    """All numbers for questions and answers by id. Entailed questions count where they are among the questions.

    Consistency, validity, plausibility and distribution are those of the official column.
    Raises ValueError for no balanced question, or for a question without an answer.
    """
    balanced = {id_: question for id_, question in questions.items() if question["isBalanced"]}
    if not balanced:
        raise ValueError("none of the questions is balanced; the official numbers are of balanced questions alone")
    if missing := [id_ for id_ in balanced if id_ not in answers]:
        raise ValueError(f"no answer to {len(missing)} balanced questions: {', '.join(missing[:5])}")
    predictions = {id_: prediction(answer) for id_, answer in answers.items()}
    items = {id_: score(answers[id_], question) for id_, question in balanced.items()}
    of_open = [items[id_] for id_, question in balanced.items() if is_open(question)]
    of_binary = [items[id_] for id_, question in balanced.items() if not is_open(question)]
    return GqaScores(
        items=items,
        accuracy=mean(items.values()),
        binary=mean(of_binary) if of_binary else None,
        open=mean(of_open) if of_open else None,
        consistency=_consistency(questions, predictions, right_ids=[id_ for id_ in items if items[id_].official]),
        validity=_share_in(balanced, predictions, choices, "valid"),
        plausibility=_share_in(balanced, predictions, choices, "plausible"),
        distribution=_distribution(balanced, predictions),
    )


def is_open(question: Question) -> bool:
    """Whether the question is open; the others (verify, logical, choose, compare) are called binary."""
    return bool(question["types"]["structural"] == "query")


def _consistency(
    questions: Mapping[str, Question], predictions: Mapping[str, str], *, right_ids: Iterable[str]
) -> float | None:
    means = []
    for id_ in right_ids:
        entailed = [one for one in questions[id_].get("entailed", ()) if one != id_ and one in questions]
        if unanswered := [one for one in entailed if one not in predictions]:
            raise ValueError(f"question {id_} entails {unanswered[0]}, which has no answer; answer it too or drop it")
        if entailed:
            means.append(sum(predictions[one] == questions[one]["answer"] for one in entailed) / len(entailed))
    return sum(means) / len(means) if means else None


def _share_in(
    questions: Mapping[str, Question], predictions: Mapping[str, str], choices: Choices | None, key: str
) -> float | None:
    if choices is None:
        return None
    inside = [
        predictions[id_] in (_COMMON if "Common" in question["types"]["detailed"] else choices[id_][key])
        for id_, question in questions.items()
    ]
    return sum(inside) / len(inside)


def _distribution(questions: Mapping[str, Question], predictions: Mapping[str, str]) -> float | None:
    true: dict[str, Counter[str]] = defaultdict(Counter)
    given: dict[str, Counter[str]] = defaultdict(Counter)
    for id_, question in questions.items():
        if (group := question["groups"]["global"]) is not None:
            true[group][question["answer"]] += 1
            given[group][predictions[id_]] += 1
    if not true:
        return None
    total = sum(
        sum((given[group][answer] - expected) ** 2 / expected for answer, expected in answers.items()) * answers.total()
        for group, answers in true.items()
    )
    return total / sum(answers.total() for answers in true.values()) / 100
