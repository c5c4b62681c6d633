"""Which demonstrations come before an item, and its prompt after them. Pure."""

# C candidates, F features

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice

import numpy as np
from numpy.typing import NDArray

from vila_ops.config.few_shot import FewShot
from vila_ops.data.records import Image
from vila_ops.eval.benchmark import Item, Parts, Request, SealedImage, TextPrompt
from vila_ops.eval.metrics.answers import normalised
from vila_ops.eval.prompts import after_demonstrations

REVISION = 1
"""Raised when other demonstrations are chosen, or written otherwise, for the same items, pool and model."""
DECIMALS = 6
"""Similarities that are equal to so many are a tie, so that the last bits of a processor change no choice."""
DigestOf = Callable[[Image | SealedImage], str]
"""The content of an image as a digest; equal for the images of items and of candidates."""
Vectors = NDArray[np.float64]
VectorsOf = Callable[[Sequence[Item]], Vectors]
"""Features (N, F) of the first images of N items."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """An item that may be a demonstration."""

    own: Item
    """As it is in the pool."""
    shown: Item
    """As the control shows it, under an id that says so."""
    images: frozenset[str]
    """Digests of its images and of those that are shown."""


def candidates_of(pool: Sequence[Item], few_shot: FewShot, digest_of: DigestOf) -> list[Candidate]:
    """The candidates among the items of a pool, in an order that the seed gives.

    Items without an answer, or with an image that cannot be read, are none; a warning says how many. Raises ValueError
    for a pool without candidates.
    """
    usable = sorted((item for item in pool if item.answer and item.problem() is None), key=lambda item: item.id)
    if left_out := len(pool) - len(usable):
        log.warning("%d of %d items cannot be demonstrations: no answer, or no readable image", left_out, len(pool))
    if not usable:
        raise ValueError(f"none of the {len(pool)} items of the pool has an answer and its images; choose another pool")
    count = min(few_shot.candidates or len(usable), len(usable))
    drawn = random.Random(f"few_shot/{few_shot.seed}/candidates").sample(usable, count)
    digests = [frozenset(map(digest_of, item.readable_images())) for item in drawn]
    return [_candidate(place, drawn, digests, few_shot) for place in range(count)]


def _candidate(place: int, drawn: Sequence[Item], digests: Sequence[frozenset[str]], few_shot: FewShot) -> Candidate:
    own = drawn[place]
    if few_shot.control == "none" or not digests[place]:
        return Candidate(own, own, digests[place])
    if few_shot.control == "text_only":
        return Candidate(own, replace(own, id=f"{own.id} (text only)", parts=_with_images(own, ())), digests[place])
    following = [(place + step) % len(drawn) for step in range(1, len(drawn))]
    other = next((one for one in following if digests[one] and not digests[one] & digests[place]), None)
    if other is None:
        raise ValueError(f"demonstration {own.id!r} has no other image to be shown with; the pool needs two images")
    shown = replace(
        own, id=f"{own.id} (images of {drawn[other].id})", parts=_with_images(own, drawn[other].readable_images())
    )
    return Candidate(own, shown, digests[place] | digests[other])


def _with_images(item: Item, images: Sequence[Image | SealedImage]) -> Mapping[str, Parts]:
    """The parts of an item with other images in the places of its own, or without any."""
    others = cycle(images)
    return {
        name: tuple(
            part if not isinstance(part, (Image, SealedImage)) else next(others) if images else "" for part in parts
        )
        for name, parts in item.parts.items()
    }


def demonstrations(
    items: Sequence[Item],
    candidates: Sequence[Candidate],
    few_shot: FewShot,
    digest_of: DigestOf,
    vectors: VectorsOf | None = None,
) -> dict[str, tuple[str, ...]]:
    """The ids, as they are shown, of the demonstrations of each item in their order; none has an image of the item.

    `vectors` is for the selection of the nearest. Raises ValueError, which names the item, where too few candidates
    are left.
    """
    places_of = _by_similarity(items, candidates, vectors) if vectors else _by_draw(candidates, few_shot)
    showing: dict[str, set[int]] = {}
    for place, candidate in enumerate(candidates):
        for name in (candidate.own.id, *candidate.images):
            showing.setdefault(name, set()).add(place)
    is_reversed = few_shot.selection.order in ("reversed", "nearest_last")
    chosen = {}
    for item in items:
        barred = set().union(*(showing.get(name, ()) for name in (item.id, *map(digest_of, item.readable_images()))))
        if len(candidates) - len(barred) < few_shot.shots:
            raise ValueError(
                f"item {item.id!r} has {len(candidates) - len(barred)} candidates that do not show an image of it, and "
                f"few_shot.shots is {few_shot.shots}; take fewer shots, more candidates or another pool"
            )
        taken = list(islice((place for place in places_of(item) if place not in barred), few_shot.shots))
        chosen[item.id] = tuple(candidates[place].shown.id for place in (taken[::-1] if is_reversed else taken))
    return chosen


def _by_draw(candidates: Sequence[Candidate], few_shot: FewShot) -> Callable[[Item], Iterator[int]]:
    """Places of candidates as they are drawn for an item, each once."""

    def places(item: Item) -> Iterator[int]:
        draw, drawn = random.Random(f"few_shot/{few_shot.seed}/{item.id}"), set[int]()
        while len(drawn) < len(candidates):
            place = draw.randrange(len(candidates))
            if place not in drawn:
                drawn.add(place)
                yield place

    return places


def _by_similarity(
    items: Sequence[Item], candidates: Sequence[Candidate], vectors: VectorsOf
) -> Callable[[Item], Iterator[int]]:
    """Places of candidates from the most similar to the least; ties by id. Raises ValueError for what has no image."""
    known = _unit(vectors([candidate.own for candidate in candidates]))
    by_id = sorted(range(len(candidates)), key=lambda place: candidates[place].own.id)
    rank = np.empty(len(candidates), np.int64)
    rank[by_id] = np.arange(len(candidates))
    asked = [item for item in items if item.problem() is None]
    place_of = {item.id: place for place, item in enumerate(asked)}
    own = _unit(vectors(asked))

    def places(item: Item) -> Iterator[int]:
        if item.id not in place_of:  # it has an image that cannot be read, so it is not asked
            return iter(by_id)
        similarity = np.round(known @ own[place_of[item.id]], DECIMALS)
        return iter(np.lexsort((rank, -similarity)).tolist())

    return places


def _unit(vectors: Vectors) -> Vectors:
    """Vectors (N, F) of length one."""
    unit: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


def with_demonstrations(
    requests: Sequence[Request], shots: Mapping[str, Sequence[str]], shown: Mapping[str, tuple[Parts, str]]
) -> list[Request]:
    """Requests after the demonstrations of their items: `shots` has the ids of these, `shown` question and answer."""

    def after(request: Request) -> Request:
        ids = tuple(shots[request.item])
        assert isinstance(request.prompt, TextPrompt)  # official benchmarks are written without a tokenizer
        return replace(request, shots=ids, prompt=after_demonstrations(request.prompt, [shown[id_] for id_ in ids]))

    return [after(request) for request in requests]


def is_copy(answer: str, shown: Sequence[str]) -> bool:
    """Whether an answer equals one of the answers that the demonstrations show."""
    return normalised(answer) in map(normalised, shown)
