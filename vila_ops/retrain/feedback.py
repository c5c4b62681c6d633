"""Slices of people's ratings in which a model's answers are called bad too often. `slices_of` is pure."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from vila_ops.artifacts.store import backend
from vila_ops.config import Config
from vila_ops.config.retrain import FeedbackRules
from vila_ops.serve.app.samples import DIGITS

RECORDS, RATINGS = "records", "ratings"
LONG_WORDS = 20
"""Words from which on a question counts as long."""


class Rated(Config):
    """An answer with its last rating, and the conversation where it was kept."""

    is_bad: bool
    messages: tuple[dict[str, Any], ...] | None


class ErrorSlice(Config):
    """The ratings of one kind of request."""

    name: str
    rated: int
    bad: int
    p_value: float
    """Of the hypothesis that at most `max_bad_share` of such answers are called bad; an exact binomial test."""
    exceeds: bool


def ratings_of(place: str, digest: str) -> list[Rated]:
    """The rated answers of a model among those that a service keeps, by its digest, each with its last rating."""
    of_model = f"chatcmpl-{digest[:DIGITS]}-"
    last: dict[str, dict[str, Any]] = {}
    names = [entry.name for entry in backend(place).entries(f"{place}/{RATINGS}")]
    for name in sorted(name for name in names if name.startswith(of_model) and name.endswith(".json")):
        rating = _json(f"{place}/{RATINGS}/{name}")
        if rating is not None and rating["at"] >= last.get(rating["id"], rating)["at"]:
            last[rating["id"]] = rating
    kept = {id_: _json(f"{place}/{RECORDS}/{id_}.json") for id_ in last}
    return [
        Rated(is_bad=one["rating"] == "bad", messages=(record["messages"] if (record := kept[id_]) else None))
        for id_, one in last.items()
    ]


def num_ratings(place: str) -> int:
    """How many ratings a service keeps."""
    return sum(entry.name.endswith(".json") for entry in backend(place).entries(f"{place}/{RATINGS}"))


def slices_of(rated: Iterable[Rated], rules: FeedbackRules) -> tuple[ErrorSlice, ...]:
    """All ratings, and those of each kind of request, at a level that all of them share (Bonferroni)."""
    from scipy.stats import binomtest  # slow to import

    groups: dict[str, list[bool]] = defaultdict(list)
    for one in rated:
        for name in ("all", *_kinds(one.messages)):
            groups[name].append(one.is_bad)
    slices = []
    for name, bad in sorted(groups.items()):
        p_value = float(binomtest(sum(bad), len(bad), rules.max_bad_share, alternative="greater").pvalue)
        exceeds = p_value <= rules.level / len(groups)
        slices.append(ErrorSlice(name=name, rated=len(bad), bad=sum(bad), p_value=p_value, exceeds=exceeds))
    return tuple(slices)


def _kinds(messages: Iterable[Mapping[str, Any]] | None) -> list[str]:
    """The kinds of a request, by its images, its turns and the length of its last question."""
    if messages is None:
        return []
    *before, _ = messages
    asked = [one for one in before if one["role"] == "user"]
    images = sum(part["type"] == "image_url" for one in before for part in _parts(one))
    words = sum(len(part["text"].split()) for one in asked[-1:] for part in _parts(one) if part["type"] == "text")
    return [
        "without an image" if not images else "with an image" if images == 1 else "with several images",
        "one question" if len(asked) == 1 else "a later question",
        "long question" if words >= LONG_WORDS else "short question",
    ]


def _parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _json(place: str) -> dict[str, Any] | None:
    """The content of a file; None for one that was removed meanwhile."""
    data = backend(place).read(place)
    return None if data is None else json.loads(data)
