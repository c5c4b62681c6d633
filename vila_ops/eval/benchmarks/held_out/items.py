"""Held-out images, words and samples of a prepared mixture, as items of benchmarks."""

import operator
import random
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle, islice
from typing import Any

from pydantic import Field

from vila_ops.artifacts.kinds import Dataset
from vila_ops.config import Config, Split, Suite
from vila_ops.config.eval import CONVERSATIONS, Objects, SuiteSettings
from vila_ops.data.shards import Sample, index_of, named, runs, samples_of
from vila_ops.data.split import split_of
from vila_ops.eval.benchmark import Item, LazyTokenizer

KNOWN = Split(salt="known objects", validation=0.25, test=0.49)
"""By which known objects are read on validation or on test; the rest is not read."""


class EvalInputs(Config):
    """What the items of a benchmark on held-out data are read from."""

    data: Dataset
    settings: SuiteSettings
    captions: tuple[str, ...]
    """Sources of the dataset whose records are captioned images, in the styles of training data."""
    kept_out: tuple[str, ...] = Field(default=(), exclude_if=operator.not_)
    """Sources of captioned images in a style that no training mixture has."""
    definitions: tuple[str, ...]
    """Sources of the dataset whose records are words with their meanings."""
    conversations: tuple[str, ...] = Field(default=(), exclude_if=operator.not_)
    """Sources of the dataset whose records are questions with answers."""

    @classmethod
    def of(cls, suite: Suite, data: Dataset) -> "EvalInputs":
        """The inputs of every benchmark of a suite."""
        renders = {name: source.render for name, source in sorted(suite.mixture.sources.items())}
        return cls(
            data=data,
            settings=suite.settings(),
            captions=captions_of(suite),
            kept_out=tuple(sorted(suite.kept_out)),
            definitions=tuple(name for name, render in renders.items() if render == "definition"),
            conversations=tuple(name for name, render in renders.items() if render in CONVERSATIONS),
        )


def captions_of(suite: Suite) -> tuple[str, ...]:
    """The sources of a suite whose records are captioned images, in the styles of training data."""
    sources = sorted(suite.mixture.sources.items())
    return tuple(name for name, one in sources if one.render == "caption" and name not in suite.kept_out)


@dataclass(frozen=True)
class HeldOut:
    """The source of benchmarks on held-out data."""

    inputs: EvalInputs
    tokenizer: LazyTokenizer


@dataclass(frozen=True, kw_only=True)
class ImageItem(Item):
    """One held-out object, its group: an image, its caption, and what they are compared with."""

    category: str = ""
    image: bytes
    shuffled_image: bytes
    """The control's image: that of another object, by a fixed permutation without fixed points."""
    caption: str
    distractors: tuple[str, ...]
    """Captions of three other held-out objects, or of fewer where there are no more; the same category first."""
    absent: str | None = None
    """Name of another held-out object, which is in neither image; None where there is none."""


@dataclass(frozen=True, kw_only=True)
class CaptionItem(ImageItem):
    """A held-out image and the caption of the chance level."""

    frequent_caption: str
    """The most frequent training caption, the same for all items."""


@dataclass(frozen=True, kw_only=True)
class WordItem(Item):
    """One held-out word with its meaning, and the meanings of three other words, those of the same category first."""

    word: str
    meaning: str
    distractors: tuple[str, str, str]


@dataclass(frozen=True, kw_only=True)
class SampleItem(Item):
    """One held-out sample as it would be trained on: its tokens, and the images of the two conditions."""

    text: str
    input_ids: list[int]
    """An image is a run of the image token, as in `Tokenizer`."""
    spans: tuple[tuple[int, int], ...]
    """[start, stop) of each run of target tokens."""
    images: tuple[bytes, ...]
    shuffled_images: tuple[bytes, ...]
    """As many images of other objects."""


@lru_cache(maxsize=2)
def image_items(inputs: EvalInputs, objects: Objects) -> tuple[ImageItem, ...]:
    """One item for each object, at most `max_objects`.

    The result is kept for the next benchmark of the suite.
    """
    held_out = _held_out(inputs, inputs.captions) if objects == "new" else _of_known_objects(inputs)
    rows = _one_each(held_out)[: inputs.settings.max_objects]
    samples = _samples(inputs, rows)
    seed = inputs.settings.seed
    order = list(range(len(samples)))
    random.Random(f"{seed}/derangement").shuffle(order)
    # one cycle through all items, so that no item keeps its matched image
    shuffled = {order[place]: order[(place + 1) % len(order)] for place in range(len(order))}
    return tuple(_image_item(number, samples, shuffled[number], seed=seed) for number in range(len(samples)))


@lru_cache(maxsize=1)
def word_items(inputs: EvalInputs) -> tuple[WordItem, ...]:
    """One item for each word, at most `max_words`. Raises ValueError for too few words to draw distractors from."""
    rows = _one_each(_held_out(inputs, inputs.definitions))[: inputs.settings.max_words]
    samples = _samples(inputs, rows)
    categories = [sample.category for _, sample in samples]
    meanings = [sample.text.partition(": ")[2] for _, sample in samples]
    items = []
    for number, (name, sample) in enumerate(samples):
        others = _same_category_first(number, categories, random.Random(f"{inputs.settings.seed}/{name}"))
        distractors = [meanings[i] for i in others if meanings[i] != meanings[number]]
        word, three = sample.text.partition(": ")[0], _first_three(distractors, name)
        items.append(
            WordItem(
                id=name,
                group=name,
                references={"meaning": meanings[number], "distractors": three},
                answer=meanings[number],
                word=word,
                meaning=meanings[number],
                distractors=three,
            )
        )
    return tuple(items)


def sample_items(inputs: EvalInputs, sources: tuple[str, ...] | None, *, with_images: bool) -> tuple[SampleItem, ...]:
    """The held-out samples of some sources, or of all but those kept out (None), of at most `max_objects` objects.

    `with_images`: only those that have an image.
    """
    held_out = [row for row in _held_out(inputs, sources) if row["source"] not in inputs.kept_out]
    rows = [row for row in held_out if row["num_images"] or not with_images]
    objects = [row["object"] for row in _one_each(rows)][: inputs.settings.max_objects]
    number = {name: place for place, name in enumerate(objects)}
    kept = sorted(
        (row for row in rows if row["object"] in number), key=lambda row: (number[row["object"]], row["name"])
    )
    samples = _samples(inputs, kept)
    shown = {sample.object: sample.images for _, sample in reversed(samples)}
    return tuple(
        SampleItem(
            id=name,
            group=sample.object,
            references={"text": sample.text},
            text=sample.text,
            input_ids=sample.input_ids,
            spans=tuple((max(1, start), stop) for start, stop in runs(sample.is_target) if stop > 1),
            images=sample.images,
            shuffled_images=_images_of_others(sample, objects, shown),
        )
        for name, sample in samples
        if any(sample.is_target[1:])  # the first token is never predicted
    )


def _images_of_others(sample: Sample, objects: list[str], shown: Mapping[str, tuple[bytes, ...]]) -> tuple[bytes, ...]:
    """As many images as a sample has, of the objects after its own, in a circle; its own where there is no other."""
    own = objects.index(sample.object)
    others = [image for name in objects[own + 1 :] + objects[:own] for image in shown[name]]
    return tuple(islice(cycle(others), len(sample.images))) if others else sample.images


def caption_items(inputs: EvalInputs, objects: Objects) -> tuple[CaptionItem, ...]:
    """The image items with the most frequent training caption. Raises ValueError without a training caption."""
    frequent = frequent_caption(inputs)
    return tuple(CaptionItem(**vars(item), frequent_caption=frequent) for item in image_items(inputs, objects))


def frequent_caption(inputs: EvalInputs) -> str:
    """The most frequent training caption: the best answer that does not look at the image."""
    rows = [row for row in _rows(inputs, inputs.captions) if row["split"] == "train"]
    counts = Counter(sample.text for sample in samples_of(inputs.data, rows))
    if not counts:
        raise ValueError("no training caption to take the most frequent one from; give the mixture a training split")
    return min(counts, key=lambda text: (-counts[text], text))


def _rows(inputs: EvalInputs, sources: tuple[str, ...] | None) -> list[dict[str, Any]]:
    return [row for row in index_of(inputs.data).to_pylist() if sources is None or row["source"] in sources]


def _held_out(inputs: EvalInputs, sources: tuple[str, ...] | None) -> list[dict[str, Any]]:
    return named(row for row in _rows(inputs, sources) if row["split"] == inputs.settings.split)


def _of_known_objects(inputs: EvalInputs) -> list[dict[str, Any]]:
    """The rows of kept-out sources whose objects training data names, those of the split."""
    rows, split = _rows(inputs, (*inputs.captions, *inputs.kept_out)), inputs.settings.split
    known = known_objects(rows, inputs.captions, split=split)
    return named(row for row in rows if row["source"] in inputs.kept_out and row["object"] in known)


def known_objects(rows: Iterable[Mapping[str, Any]], captions: Collection[str], *, split: str) -> set[str]:
    """The objects of training captions that are read for a split: choices are made on those of validation alone."""
    named_in_training = {row["object"] for row in rows if row["source"] in captions and row["split"] == "train"}
    return {name for name in named_in_training if split_of(name, KNOWN) == split}


def _samples(inputs: EvalInputs, rows: list[dict[str, Any]]) -> list[tuple[str, Sample]]:
    """The samples of some rows with their names, by which the items are the same for models of any text format."""
    return [(row["name"], sample) for row, sample in zip(rows, samples_of(inputs.data, rows), strict=True)]


def _one_each(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row of each object, in an order that does not depend on what the objects are."""
    first: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["name"]):
        first.setdefault(row["object"], row)
    names = sorted(first)
    random.Random("items").shuffle(names)
    return [first[name] for name in names]


def _image_item(number: int, samples: list[tuple[str, Sample]], shuffled: int, *, seed: int) -> ImageItem:
    name, sample = samples[number]
    draw = random.Random(f"{seed}/{name}")
    others = _same_category_first(number, [one.category for _, one in samples], draw)
    distractors = [text for text in (samples[i][1].text for i in others) if text != sample.text]
    unseen = [i for i in others if i != shuffled]  # the shuffled image must not show it either
    absent = samples[unseen[0 if draw.random() < 0.5 else -1]][1].object if unseen else None
    return ImageItem(
        id=name,
        group=sample.object,
        references={"caption": sample.text, "distractors": distractors[:3]},
        answer=sample.text,
        category=sample.category,
        image=sample.images[0],
        shuffled_image=samples[shuffled][1].images[0],
        caption=sample.text,
        distractors=tuple(distractors[:3]),
        absent=absent,
    )


def _same_category_first(number: int, categories: list[str], draw: random.Random) -> list[int]:
    """The other items in random order, those of the same category first."""
    others = [place for place in range(len(categories)) if place != number]
    draw.shuffle(others)
    return sorted(others, key=lambda place: categories[place] != categories[number])


def _first_three(distractors: list[str], key: str) -> tuple[str, str, str]:
    if len(distractors) < 3:
        raise ValueError(f"item {key!r}: only {len(distractors)} distractors; enlarge the split or the sources")
    return distractors[0], distractors[1], distractors[2]
