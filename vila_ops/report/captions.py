"""The captions that the report of a run shows, and how many of all are right. Pure."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from vila_ops.config.eval import CaptionCider
from vila_ops.eval.report import ItemAnswer
from vila_ops.report.words import same_words

Json = dict[str, Any]

FIRST = 6
"""Captions on the first screen."""
SHOWN = 24
"""Captions in the gallery, of all benchmarks together; each benchmark has at least FIRST."""
ORDER = ("known", "new", None)
"""What the captioned objects are, the kind of the first screen first; None: the answers are no captions."""


def captions(answers: Mapping[str, Sequence[ItemAnswer]], benchmarks: Mapping[str, object]) -> list[Json]:
    """How many answers of each benchmark are right, and which are shown; the kinds in ORDER, without empty ones.

    `answers` and `benchmarks` (their configs) are by the suite's names. The shown ones are the first by the SHA-256 of
    the item's name, so that no answer can change the choice.
    """
    answered = {name: own for name, own in answers.items() if own}
    parts = [_part(name, own, benchmarks[name], len(answered)) for name, own in answered.items()]
    return sorted(parts, key=lambda part: ORDER.index(part["objects"]))


def _part(name: str, answers: Sequence[ItemAnswer], benchmark: object, num_parts: int) -> Json:
    ranked = sorted(answers, key=lambda one: hashlib.sha256(one.item.encode()).digest())
    listed = [{**dict(one), "right": same_words(one.answer, one.truth)} for one in ranked]
    return {
        "benchmark": name,
        "objects": benchmark.objects if isinstance(benchmark, CaptionCider) else None,
        "right": sum(one["right"] for one in listed),
        "of": len(listed),
        "shown": listed[: max(FIRST, SHOWN // num_parts)],
    }
