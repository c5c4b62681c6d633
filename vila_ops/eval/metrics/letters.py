"""The letter of an option in a free answer to a multiple-choice question. Pure.

Each benchmark has a rule of its own: MMBench that of VLMEvalKit (`vlmeval_letter`), SEED-Bench in LLaVA's script the
answer as it is (`exact_letter`), SEED-Bench in lmms-eval the first character (`first_letter`). Rules of ScienceQA and
MMMU are in their modules. The corrected column of all of them is `corrected_letter`.
"""

import re
from collections.abc import Iterator, Mapping

from vila_ops.eval.metrics.answers import half_width

Options = Mapping[str, str]
"""The options' texts by their letters, in their order."""

REJECTED = "Z"
"""The letter that VLMEvalKit gives an answer that rejects the question."""

_SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_REJECTIONS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_CUE = r"(?:\b(?:answer|option|choice)(?:\s+is)?|答 +案(?: +[是为])?|选(?: +[择项])?(?: +[是为])?)"
_STATED = re.compile(_CUE + r"\s*[:=]?\s*[\s*_([{\"']*([A-Z])(?![\w'’])", re.IGNORECASE)
_STATEMENT_END = re.compile(r"[*_}\"']*\s*(?:[.,;:!?)\]。]|$)")
_LEADING = re.compile(r"[\s*_([{\"']*([A-Z])[*_\"']*[.:)\]]")
_WORD = re.compile(r"['’]?\s*[a-z]")
_UNSPACED = re.compile(r"[\u3001-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]")
"""A character of Chinese, Japanese or Korean, or a mark of these."""
_ALONE = re.compile(r"(?<![\w'’])([A-Z])(?![\w'’])")


def exact_letter(answer: str) -> str:
    """The rule of LLaVA's script for SEED-Bench: an answer is right if it equals the letter, with nothing around it."""
    return answer


def first_letter(answer: str) -> str:
    """The rule of lmms-eval for SEED-Bench: the first character, in any case."""
    return answer.strip()[:1].upper()


def vlmeval_letter(answer: str, options: Options) -> str | None:
    """The rule of VLMEvalKit (`can_infer` of ms-vlmeval 0.0.20) without a judge; None where it infers nothing.

    The only option's letter that stands alone, if among the last four words; else the only option whose text is in an
    answer that is not over twice as long as all options. The repository also reads "answer is B" since June 2026.
    """
    if any(rejection in answer for rejection in _REJECTIONS):
        return REJECTED
    words = answer.translate(_SEPARATORS).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and words.index(letters[0]) > len(words) - 5:
        return letters[0]
    if not letters and REJECTED in words:
        return REJECTED
    lower = answer.lower()
    if len(lower) > 2 * sum(len(text) for text in options.values()):
        return None
    inside = [letter for letter, text in options.items() if text.lower() in lower]
    return inside[0] if len(inside) == 1 else None


def corrected_letter(answer: str, options: Options) -> str | None:
    """The option that an answer names, or None where it names none or several.

    In this order: the whole answer is a letter or the text of an option; a letter with a mark begins it ("(B)", "B.",
    "B: cat"); "answer", "option", "choice" or its Chinese word stands before a letter, of which the last counts and one
    in lower case has to end the statement; one option's letter stands alone, where an "A" before a word in lower case
    is an article; the text of one option is in it as whole words. A character of Chinese, Japanese or Korean is a word.
    """
    text = _spaced(answer).strip()
    options = {letter: _spaced(option) for letter, option in options.items()}
    bare = text.strip(" \t\n.,:;!?*_()[]{}\"'。、「」")
    if bare.upper() in options:
        return bare.upper()
    if len(same := [letter for letter, option in options.items() if _folded(option) == _folded(bare)]) == 1:
        return same[0]
    if (match := _LEADING.match(text)) and match[1] in options:
        return match[1]
    if stated := [letter for letter in _stated(text) if letter in options]:
        return stated[-1]
    alone = {match[1] for match in _ALONE.finditer(text) if match[1] in options and not _is_word(text, match)}
    if len(alone) == 1:
        return alone.pop()
    named = [letter for letter, option in options.items() if _has_words(text, option)]
    return named[0] if len(named) == 1 and not alone else None


def _spaced(text: str) -> str:
    return _UNSPACED.sub(r" \g<0> ", half_width(text))


def _stated(text: str) -> Iterator[str]:
    """The letters that stand after a cue, such as "answer is"."""
    for match in _STATED.finditer(text):
        if match[1].isupper() or _STATEMENT_END.match(text, match.end()):
            yield match[1].upper()


def _is_word(text: str, match: re.Match[str]) -> bool:
    """Whether a letter is the article "A" or the pronoun "I"."""
    return match[1] in "AI" and _WORD.match(text, match.end()) is not None


def _folded(text: str) -> str:
    return " ".join(text.casefold().strip(" .").split())


def _has_words(text: str, option: str) -> bool:
    folded = _folded(option)
    return bool(folded) and re.search(rf"(?<!\w){re.escape(folded)}(?!\w)", _folded(text)) is not None
