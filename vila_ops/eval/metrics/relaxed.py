"""Relaxed accuracy, the metric of ChartQA: numbers may differ by 5 %, other answers have to be equal. Pure.

Masry et al., "ChartQA" (arXiv:2203.10244, section 5.1) after Methani et al. (arXiv:1909.00997). `official` is
`relaxed_correctness` of google-research/pix2struct at 945f27e, which Qwen-VL, lmms-eval and VLMEvalKit copy.

The columns differ in six cases.

- A true answer of 0 is compared as a text, so that "0.0" is wrong. Corrected: as a number.
- A percent sign divides by 100, on one side too, so that "5%" is wrong for "5". Corrected: also right where the
  numbers agree without the sign.
- "1,000" and "$5" are texts. Corrected: numbers.
- A year within 5 % is right, 2008 for 2010 (pix2struct#35). Corrected: a true answer that is a whole number from 1900
  to 2099 without a sign or a comma is a year, and has to be equal.
- Spaces around an answer, and a full stop at its end, make it a text that differs: "Yes." is wrong for "Yes"
  (VLMEvalKit#948). Corrected: they are removed.
- Full-width characters are others. Corrected: they are read as ASCII.

The official code also reads "nan", "inf" and "1_000" as numbers.
"""

import re

from vila_ops.eval.metrics.answers import half_width
from vila_ops.eval.metrics.columns import Columns, right

TOLERANCE = 0.05
"""Greatest relative difference from the true number."""

_NUMBER = re.compile(r"([+-]?)[$€£]?((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:e([+-]?\d+))?\s?(%?)", re.IGNORECASE)
_YEAR = re.compile(r"(?:19|20)\d\d")


def score(answer: str, truth: str) -> Columns:
    """1 where the answer is right, else 0."""
    return right(_official(answer, truth), _corrected(_bare(answer), _bare(truth)))


def _bare(text: str) -> str:
    return half_width(text).strip().rstrip(".").rstrip()


def _official(answer: str, truth: str) -> bool:
    given, true = _float(answer), _float(truth)
    if given is not None and true:
        return abs(given - true) / abs(true) <= TOLERANCE
    return answer.lower() == truth.lower()


def _float(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _corrected(answer: str, truth: str) -> bool:
    given, true = _NUMBER.fullmatch(answer), _NUMBER.fullmatch(truth)
    if given is None or true is None:
        return answer.lower() == truth.lower()
    if _YEAR.fullmatch(truth):
        return _value(given) == _value(true)
    if _near(_value(given) / _divisor(given), _value(true) / _divisor(true)):
        return True
    return given[4] != true[4] and _near(_value(given), _value(true))


def _value(number: re.Match[str]) -> float:
    """The number without its percent sign."""
    sign, digits, exponent = number[1], number[2].replace(",", ""), number[3] or "0"
    return float(f"{sign}{digits}e{exponent}")


def _divisor(number: re.Match[str]) -> float:
    return 100.0 if number[4] else 1.0


def _near(given: float, true: float) -> bool:
    return abs(given - true) <= TOLERANCE * abs(true)
