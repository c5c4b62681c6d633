"""Scores of BIG-Bench Hard: exact match with the target. Pure.

Suzgun et al., "Challenging BIG-Bench Tasks" (arXiv:2210.09261). The authors publish no scorer; `official` is that of
lm-evaluation-harness 0.4.13 (`bbh/cot_fewshot`, `bbh/fewshot`), the one in common use. The direct and the
chain-of-thought prompt are two variants, and a number names its own.

The columns differ as follows.

- Chain of thought: the harness takes what follows the first "the answer is " up to the last character of its line,
  which it takes for a full stop, so that "the answer is (A)" without one is "(A". Corrected: the last such statement,
  without a full stop.
- Direct: the harness compares the text as it came. Corrected: the first line that is not empty, without a full stop.
- Corrected, in both: case and the number of spaces do not matter, and "(A)" may be written "A".
"""

import re
from typing import Literal

from vila_ops.eval.metrics.columns import Columns, right

Prompt = Literal["direct", "chain_of_thought"]

NO_ANSWER = "[invalid]"
"""What lm-evaluation-harness takes for the answer where it reads none."""

_OFFICIAL_STATED = re.compile(r"(?<=the answer is )(.*)(?=.)")
_STATED = re.compile(r"the answer is:?\s", re.IGNORECASE)
_OPTION = re.compile(r"\(([a-z])\)")


def score(answer: str, target: str, *, prompt: Prompt) -> Columns:
    """1 where an answer is the target, else 0."""
    official = answer if prompt == "direct" else official_answer(answer)
    corrected = _first_line(answer) if prompt == "direct" else corrected_answer(answer)
    return right(official == target, _folded(corrected) == _folded(target))


def official_answer(text: str) -> str:
    """The answer of a chain of thought as lm-evaluation-harness reads it."""
    match = _OFFICIAL_STATED.search(text)
    return match[1].strip() if match else NO_ANSWER


def corrected_answer(text: str) -> str:
    """The last stated answer of a chain of thought, or its last line where none is stated."""
    *before, last = _STATED.split(text)
    lines = last.strip().splitlines() or [""]
    return lines[0] if before else lines[-1]


def _first_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0] if lines else ""


def _folded(text: str) -> str:
    folded = " ".join(text.casefold().split()).removesuffix(".").strip()
    return match[1] if (match := _OPTION.fullmatch(folded)) else folded
