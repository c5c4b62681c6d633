"""Ratings that a service kept, and the slices of them that are bad too often."""

import json
from pathlib import Path
from typing import Any

import pytest

from vila_ops.config.retrain import FeedbackRules
from vila_ops.retrain.feedback import Rated, ratings_of, slices_of

DIGEST = "ab" * 32
RULES = FeedbackRules(max_bad_share=0.5, level=0.05)
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
ANSWER = {"role": "assistant", "content": "A dog."}


def asked(text: str, *images: dict[str, Any]) -> list[dict[str, Any]]:
    """A conversation of one question."""
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}, ANSWER]


def write(place: Path, number: int, ratings: list[str], *, digest: str = DIGEST, kept: bool = True) -> None:
    """A response with its ratings, one a second."""
    id_ = f"chatcmpl-{digest[:16]}-{number:032x}"
    for folder in ("records", "ratings"):
        (place / folder).mkdir(parents=True, exist_ok=True)
    if kept:
        record = {"id": id_, "at": 0, "messages": asked("What is this?", IMAGE)}
        (place / f"records/{id_}.json").write_text(json.dumps(record))
    for at, rating in enumerate(ratings):
        said = {"id": id_, "at": at, "rating": rating, "right_answer": None, "key": None}
        (place / f"ratings/{id_}-{9 - at:08x}.json").write_text(json.dumps(said))


def test_the_last_rating_of_each_answer_of_the_champion_counts(tmp_path: Path) -> None:
    write(tmp_path, 1, ["bad"])
    write(tmp_path, 2, ["bad", "good"])
    write(tmp_path, 3, ["bad"], digest="cd" * 32)
    write(tmp_path, 4, ["bad"], kept=False)
    rated = ratings_of(str(tmp_path), DIGEST)
    assert sorted((one.is_bad, one.messages is not None) for one in rated) == [
        (False, True),
        (True, False),
        (True, True),
    ]


def test_slices_are_tested_together_by_hand() -> None:
    """Six bad of six at a bound of 1/2: 1/64. Four slices share the level of 1/20: 1/80 is asked of each."""
    six = [Rated(is_bad=True, messages=tuple(asked("What is this?", IMAGE)))] * 6
    slices = {one.name: one for one in slices_of(six, RULES)}
    assert set(slices) == {"all", "with an image", "one question", "short question"}
    assert slices["all"].p_value == pytest.approx(1 / 64)
    assert not slices["all"].exceeds
    seven = slices_of([*six, six[0]], RULES)
    assert [(one.bad, one.rated, one.exceeds) for one in seven] == [(7, 7, True)] * 4


def test_a_slice_is_named_although_all_answers_together_are_good() -> None:
    good = [Rated(is_bad=False, messages=tuple(asked("What is this?", IMAGE)))] * 30
    bad = [Rated(is_bad=True, messages=tuple(asked("word " * 20)))] * 10
    exceeding = [one.name for one in slices_of([*good, *bad], RULES) if one.exceeds]
    assert exceeding == ["long question", "without an image"]
