"""What the replies of judges say: the pair of scores of LLaVA-Bench, and the grade of MM-Vet. Pure.

A reply that says something else is None. It is never averaged, unlike in the official code: LLaVA's script takes (-1,
-1) for the pair, and MM-Vet's asks again at higher temperatures, and takes 0 after five tries.
"""

import re

_NUMBER = r"\d+(?:\.\d+)?"
_PAIR = re.compile(rf"\s*({_NUMBER})(?:\s*,\s*|\s+)({_NUMBER})\s*")
_GRADE = re.compile(rf"\s*({_NUMBER})(?:\s.*)?", re.DOTALL)
LOWEST, HIGHEST = 1.0, 10.0
"""Of the scores of a pair."""


def score_pair(reply: str) -> tuple[float, float] | None:
    """The scores, from 1 to 10, of the reference and of the model: two numbers alone on the first line of a reply."""
    match = _PAIR.fullmatch(reply.split("\n")[0])
    if match is None:
        return None
    reference, model = float(match[1]), float(match[2])
    return (reference, model) if all(LOWEST <= one <= HIGHEST for one in (reference, model)) else None


def grade(reply: str) -> float | None:
    """The grade, from 0 to 1, with which a reply begins."""
    match = _GRADE.fullmatch(reply)
    return float(match[1]) if match and float(match[1]) <= 1 else None
