"""Scores of MMMU as by its official `eval_utils.py`. Pure.

Yue et al., "MMMU" (arXiv:2311.16502); MMMU-Benchmark/MMMU at bb0b95a. The accuracy is that of all questions; those of
subjects and disciplines are means of their questions.

The columns differ in five cases.

- Where no option can be read, the official code draws one by a generator that is seeded once for the whole run (42), so
  that the score of a question depends on the questions before it. `official` is that of one pass over the questions in
  the order in which they are given, which has to be that of the official files. Corrected: it is wrong.
- The official code reads "C. A girl" as A, whose letter stands between spaces (OmniBench#8, which has the same code).
  Corrected: `letters.corrected_letter`.
- Open questions: the official code splits the answer into sentences at ". " before a capital letter, but after it was
  brought to lower case, so that only line ends split. Corrected: sentences are split first.
- Open questions: the official code also reads parts of a number, 234 in "1,234". Corrected: whole numbers.
- Open questions: after a cue at the end of a line the official code may take a longer cue's tail for the shortest.
  Corrected: the shortest tail that is not empty.

Both columns keep the rest of open questions: a number is right if it is equal after rounding to two decimals, and a
text if the true one is anywhere in a key part of the answer.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vila_ops.eval.metrics.columns import Columns, right
from vila_ops.eval.metrics.letters import corrected_letter

SEED = 42
"""Seed of the official code's generator."""

Parsed = float | str

_EDGES = ",.!?;:'"
_CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = frozenset(":,.!?;'")
_LONG_ANSWER = 5
"""An answer of more words than this is searched for the options' texts."""
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
_WHOLE_NUMBERS = (
    re.compile(r"-?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?"),
)  # a match takes the whole number, so that the next one begins behind it
_SENTENCE_END = re.compile(r"\.\s(?=[A-Z])|\n")


@dataclass(frozen=True)
class MmmuItem:
    """A question of MMMU with the answer of a model."""

    options: tuple[str, ...]
    """Texts of the options A, B, ...; none for an open question."""
    truth: tuple[str, ...]
    """The letter of the right option, or the true answers to an open question."""
    answer: str


def mmmu(items: Sequence[MmmuItem]) -> list[Columns]:
    """1 where an answer is right, else 0, in the order of the items, which is part of the official column."""
    generator = random.Random(SEED)
    return [_score(item, generator) for item in items]


def letter(answer: str, options: Sequence[str]) -> str | None:
    """The option that the official code reads in an answer, None where it draws one.

    A letter in brackets, else one between spaces, else an option's text in a long answer; the last of several.
    """
    text = answer
    for edge in _EDGES:
        text = text.strip(edge)
    text = f" {text} "
    letters = [chr(ord("A") + number) for number in range(len(options))]
    for shape in ("({})", " {} "):
        if named := [one for one in letters if shape.format(one) in text]:
            return max(named, key=lambda one: text.rfind(shape.format(one)))
    if len(text.split()) <= _LONG_ANSWER:
        return None
    lower = text.lower()
    contents = {one: option.lower() for one, option in zip(letters, options, strict=True)}
    named = [one for one in letters if contents[one] in lower]
    return max(named, key=lambda one: lower.rfind(contents[one])) if named else None


def official_open(answer: str) -> set[Parsed]:
    """The texts and numbers that the official code reads in the answer to an open question."""
    text = answer.strip().strip(".").lower()
    return _read(_key_parts(text.split("\n"), _official_shortest) or [text], _NUMBERS)


def corrected_open(answer: str) -> set[Parsed]:
    """The same with sentences split while they have capital letters, and with whole numbers."""
    text = answer.strip().strip(".")
    sentences = [sentence.lower() for sentence in _SENTENCE_END.split(text)]
    return _read(_key_parts(sentences, _shortest) or [text.lower()], _WHOLE_NUMBERS)


def matches(parsed: set[Parsed], truth: Sequence[str]) -> bool:
    """Whether a number equals a true one, or a true text is in one of the texts."""
    true = [one for answer in truth for one in _normalized(answer)]
    texts = [one for one in true if isinstance(one, str)]
    return any(one in true if isinstance(one, float) else any(text in one for text in texts) for one in parsed)


def _score(item: MmmuItem, generator: random.Random) -> Columns:
    if not item.options:
        return right(matches(official_open(item.answer), item.truth), matches(corrected_open(item.answer), item.truth))
    options = {chr(ord("A") + number): text for number, text in enumerate(item.options)}
    drawn = letter(item.answer, item.options) or generator.choice(list(options))
    return right(drawn in item.truth, corrected_letter(item.answer, options) in item.truth)


def _key_parts(sentences: Sequence[str], shortest: Callable[[Sequence[str]], str]) -> list[str]:
    """What follows the cues of each sentence, the shortest; an equals sign is a cue in the last sentence."""
    parts = []
    for number, sentence in enumerate(sentences, 1):
        cues = (*_CUES, "=") if number == len(sentences) else _CUES
        tails = [sentence.split(cue)[-1].strip() for cue in cues if cue in sentence]
        if (part := shortest(tails)) and part not in _TRIVIAL:
            parts.append(part)
    return parts


def _official_shortest(tails: Sequence[str]) -> str:
    """The shortest so far, where an empty one is replaced by whatever comes next."""
    shortest = ""
    for tail in tails:
        if not shortest or len(tail) < len(shortest):
            shortest = tail
    return shortest


def _shortest(tails: Sequence[str]) -> str:
    return min(filter(None, tails), key=len, default="")


def _read(parts: Sequence[str], shapes: Sequence[re.Pattern[str]]) -> set[Parsed]:
    numbers = [number for part in parts for shape in shapes for number in shape.findall(part)]
    return {one for text in (*parts, *numbers) for one in _normalized(text)}


def _normalized(text: str) -> list[Parsed]:
    """A number with two decimals, or a text in lower case; a single letter has a space beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lower = text.lower()
        return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]
