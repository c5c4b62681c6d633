"""VQA accuracy, the metric of VQAv2 and of sets in its format, such as OK-VQA. Pure.

Goyal et al., "Making the V in VQA Matter" (arXiv:1612.00837), as computed by `vqaEval.py` of GT-Vision-Lab/VQA at
a013f00, run by Python 3. Ten people answered each question; an answer scores the mean, over the ten, of min(1,
agreement with the other nine / 3), after both sides are normalised.

The columns differ in four cases.

- Ten equal human answers: the official code normalises neither side, so that "Yes." does not match "yes". Corrected:
  both sides are always normalised.
- Human answers without an `answer_id`: the official code leaves out every record that equals the one left out, so that
  ten equal records leave nothing to agree with. Corrected: one record is left out, by its position.
- More than 32 dots: the official code removes the first 32, because a flag of `re` (UNICODE, 32) is passed as the
  number of replacements. Corrected: all.
- An answer of articles alone ("a"): it becomes "" in the official code and then equals an empty answer, "an" and
  "the". Corrected: it keeps its words.

Both columns keep the rest: "none" is "0", numbers are mapped up to ten, and a dot stays only before a digit (the
pattern's look-behind is mistyped and always holds). Totals of the official code are rounded to 0.01 %; here they are
not.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vila_ops.eval.metrics.columns import Columns

HumanAnswer = Mapping[str, Any]
"""A record of an annotation file: `answer`, and further keys that the official code compares too."""

AGREEMENT = 3
"""Number of other people with the same answer from which on an answer scores 1."""

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_DOT = re.compile(r"\.(?!\d)")
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_DIGITS)}
_ARTICLES = frozenset(("a", "an", "the"))
_CONTRACTED = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've "
    "weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've "
    "why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're "
    "you've"
)
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTED.split()
    for place, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}
"""A contraction without one of its apostrophes, and the contraction; the last one is reversed in the official list."""


@dataclass(frozen=True)
class Normalizer:
    """The normalisation of answers, with the parameters in which official codes and the corrected column differ."""

    contractions: Mapping[str, str]
    max_dots: int
    """How many dots are removed; 0 for all."""
    keeps_lone_articles: bool

    def __call__(self, text: str) -> str:
        """An answer in its normal form."""
        return self.words(self.punctuation(clean(text)))

    def punctuation(self, text: str) -> str:
        """A text in which a kind of mark is removed if one of it is beside a space, else becomes a space.

        Where a comma is inside a number, all marks are removed.
        """
        removed = text
        in_number = _COMMA_IN_NUMBER.search(text) is not None
        for mark in _MARKS:
            beside_space = f"{mark} " in text or f" {mark}" in text
            removed = removed.replace(mark, "" if beside_space or in_number else " ")
        return _DOT.sub("", removed, count=self.max_dots)

    def words(self, text: str) -> str:
        """Lower case, numbers as digits, no articles, contractions with their apostrophes."""
        words = [_NUMBERS.get(word, word) for word in text.lower().split()]
        kept = [word for word in words if word not in _ARTICLES]
        if not kept and self.keeps_lone_articles:
            kept = words
        return " ".join(self.contractions.get(word, word) for word in kept)


OFFICIAL = Normalizer(CONTRACTIONS, max_dots=32, keeps_lone_articles=False)
CORRECTED = Normalizer(CONTRACTIONS, max_dots=0, keeps_lone_articles=True)


def clean(text: str) -> str:
    """A text on one line, without spaces at its ends."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def leave_one_out(answer: str, human: Sequence[str]) -> float:
    """The mean over the people of min(1, agreement of the others / 3), by position. Raises ValueError without people.

    With ten people: 0.3 for one that agrees, 0.6 for two, 0.9 for three, 1 for four and more.
    """
    if not human:
        raise ValueError("a question without human answers cannot be scored; look at its annotation")
    agreeing = human.count(answer)
    return sum(min(1, (agreeing - (other == answer)) / AGREEMENT) for other in human) / len(human)


def leave_equal_out(answer: str, human: Sequence[HumanAnswer]) -> float:
    """The same as in the official code, which leaves out every record that equals the one left out."""
    scores: list[float] = [
        min(1, sum(other["answer"] == answer for other in human if other != one) / AGREEMENT) for one in human
    ]
    return sum(scores) / len(scores)


def score(answer: str, human: Sequence[HumanAnswer]) -> Columns:
    """The VQA accuracy of an answer, from 0 to 1, against the records of its annotation.

    Raises ValueError for a question without human answers.
    """
    corrected = leave_one_out(CORRECTED(answer), [CORRECTED(record["answer"]) for record in human])
    return Columns(official=_official(answer, human), corrected=corrected)


def _official(answer: str, human: Sequence[HumanAnswer]) -> float:
    records = [{**record, "answer": clean(record["answer"])} for record in human]
    given = clean(answer)
    if len({record["answer"] for record in records}) > 1:
        records = [{**record, "answer": OFFICIAL(record["answer"])} for record in records]
        given = OFFICIAL(given)
    return leave_equal_out(given, records)
