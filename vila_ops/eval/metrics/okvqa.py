"""Scores of OK-VQA, and its variants by name. Pure.

Marino et al., "OK-VQA" (arXiv:1906.00067). The official numbers are those of VQA's code (`vqa.score`) on the `answer`
of each record, which is stemmed; `raw_answer` is not. Papers differ in more than the model:

- `okvqa`: `vqa.score`, the model's answer as it is.
- `okvqa_lavis`: the evaluator of LAVIS (`vqa_eval.py` at 506965b), by which BLIP-2 and InstructBLIP are published. It
  always normalises the model's answer, but of the human answers only the punctuation, and that not if all are equal.
- `okvqa_lavis_lemmatised`: the same on the lemmatised answer. LAVIS lemmatises because the human answers are stemmed,
  which moves a result from 35 to 40 (LAVIS#156). A lemmatiser is part of the name: see `lemmatised_variant`.

A baseline stands beside its own variant only.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from vila_ops.eval.metrics.vqa import OFFICIAL, HumanAnswer, leave_equal_out

_LEMMATISED = ("NOUN", "VERB")
"""Parts of speech whose words are replaced by their lemmas."""


class Word(Protocol):
    """A token as spaCy returns it."""

    @property
    def text(self) -> str: ...

    @property
    def pos_(self) -> str: ...

    @property
    def lemma_(self) -> str: ...


def lemmatised(answer: str, analyse: Callable[[str], Iterable[Word]]) -> str:
    """An answer with nouns and verbs as their lemmas, by the rule of LAVIS.

    `analyse` is a loaded pipeline of spaCy; LAVIS takes `en_core_web_sm`.
    """
    return " ".join(word.lemma_ if word.pos_ in _LEMMATISED else word.text for word in analyse(answer))


def lemmatised_variant(meta: Mapping[str, Any]) -> str:
    """The metric's name for the `meta` of a pipeline of spaCy, such as okvqa_lavis_lemmatised[en_core_web_sm-3.8.0]."""
    return f"okvqa_lavis_lemmatised[{meta['lang']}_{meta['name']}-{meta['version']}]"


def lavis_score(answer: str, human: Sequence[HumanAnswer]) -> float:
    """The accuracy of an answer by the evaluator of LAVIS, from 0 to 1. Raises ValueError without human answers."""
    if not human:
        raise ValueError("a question without human answers cannot be scored; look at its annotation")
    records = [dict(record) for record in human]
    if len({record["answer"] for record in records}) > 1:
        records = [{**record, "answer": OFFICIAL.punctuation(record["answer"])} for record in records]
    return leave_equal_out(OFFICIAL(answer), records)
