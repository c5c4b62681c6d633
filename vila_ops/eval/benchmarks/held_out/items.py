"""What a suite asks about: held-out images and held-out words, read from a prepared mixture."""

import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

from vila_ops.artifacts.kinds import Dataset
from vila_ops.config import Suite
from vila_ops.data.shards import Sample, index_of, samples_of


@dataclass(frozen=True)
class ImageItem:
    """One held-out object: its image, its caption, and what it is confused with."""

    key: str
    object: str
    category: str
    image: bytes
    other_image: bytes
    """The control's image: another object's, by a fixed permutation without fixed points."""
    caption: str
    distractors: tuple[str, str, str]
    """Captions of three other held-out objects, near ones first."""
    absent: str
    """Name of another held-out object, in neither image."""


@dataclass(frozen=True)
class WordItem:
    """One held-out word with its meaning and three other words' meanings of the same category."""

    key: str
    word: str
    meaning: str
    distractors: tuple[str, str, str]


@dataclass(frozen=True)
class Items:
    """Everything that the benchmarks of a suite read."""

    images: tuple[ImageItem, ...]
    words: tuple[WordItem, ...]
    frequent_caption: str
    """The most frequent caption of the training side: what an answer without looking would be."""


def read_items(dataset: Dataset, suite: Suite) -> Items:
    """The suite's items. Raises ValueError when there are too few to draw distractors from."""
    sources = suite.mixture.sources
    captioned = {name for name, source in sources.items() if source.render == "caption"}
    worded = {name for name, source in sources.items() if source.render == "definition"}
    index = index_of(dataset).to_pylist()
    held_out = [row for row in index if row["split"] == suite.split]
    shown = _one_each([row for row in held_out if row["source"] in captioned])[: suite.max_objects]
    images = list(samples_of(dataset, shown))
    defined = _one_each([row for row in held_out if row["source"] in worded])[: suite.max_words]
    words = list(samples_of(dataset, defined))
    return Items(
        images=_images(images, seed=suite.seed),
        words=_words(words, seed=suite.seed),
        frequent_caption=_frequent_caption(dataset, [row for row in index if row["source"] in captioned]),
    )


def _one_each(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row of each object, objects in an order that has nothing to do with their names."""
    first: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["key"]):
        first.setdefault(row["object"], row)
    names = sorted(first)
    random.Random("items").shuffle(names)
    return [first[name] for name in names]


def _images(samples: list[Sample], *, seed: int) -> tuple[ImageItem, ...]:
    if len(samples) < 5:
        raise ValueError(f"{len(samples)} held-out images, at least 5 objects are needed; enlarge the split")
    order = list(range(len(samples)))
    random.Random(f"{seed}/derangement").shuffle(order)
    after = {order[place]: order[(place + 1) % len(order)] for place in range(len(order))}  # one cycle: no fixed point
    images = []
    for number, sample in enumerate(samples):
        draw = random.Random(f"{seed}/{sample.key}")
        others = _near_first(number, [s.category for s in samples], draw)
        distractors = tuple(samples[i].text for i in others if samples[i].text != sample.text)[:3]
        unseen = [i for i in others if i != after[number]]  # nor is it in the control's image
        absent = samples[unseen[0 if draw.random() < 0.5 else -1]].object
        images.append(
            ImageItem(
                key=sample.key,
                object=sample.object,
                category=sample.category,
                image=sample.images[0],
                other_image=samples[after[number]].images[0],
                caption=sample.text,
                distractors=_three(distractors, sample.key),
                absent=absent,
            )
        )
    return tuple(images)


def _words(samples: list[Sample], *, seed: int) -> tuple[WordItem, ...]:
    words = []
    meanings = [sample.text.partition(": ")[2] for sample in samples]
    for number, sample in enumerate(samples):
        others = _near_first(number, [s.category for s in samples], random.Random(f"{seed}/{sample.key}"))
        distractors = tuple(meanings[i] for i in others if meanings[i] != meanings[number])[:3]
        word = sample.text.partition(": ")[0]
        words.append(WordItem(sample.key, word, meanings[number], _three(distractors, sample.key)))
    return tuple(words)


def _near_first(own: int, categories: list[str], draw: random.Random) -> list[int]:
    """The other places in random order, those of the same category first."""
    others = [place for place in range(len(categories)) if place != own]
    draw.shuffle(others)
    return sorted(others, key=lambda place: categories[place] != categories[own])


def _three(found: tuple[str, ...], key: str) -> tuple[str, str, str]:
    if len(found) < 3:
        raise ValueError(f"item {key!r}: only {len(found)} distractors; enlarge the split or the sources")
    return found[0], found[1], found[2]


def _frequent_caption(dataset: Dataset, rows: list[dict[str, Any]]) -> str:
    train = [row for row in rows if row["split"] == "train"]
    texts = [sample.text for sample in samples_of(dataset, train)]
    if not texts:
        raise ValueError("no training caption to take the most frequent one from")
    counts = Counter(texts)
    return min(counts, key=lambda text: (-counts[text], text))
