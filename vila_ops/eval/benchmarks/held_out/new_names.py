"""Choice of a made-up name that only the prompt's demonstrations give; see `config.eval.NewNames`."""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image as Pillow
from PIL import ImageOps

from vila_ops.config.eval import NewNames
from vila_ops.eval.benchmark import LazyTokenizer, MetricValues, ScoreRequest, Units
from vila_ops.eval.benchmarks.held_out.items import HeldOut, ImageItem, image_items
from vila_ops.eval.benchmarks.held_out.prompts import of_condition
from vila_ops.eval.metrics.choice import share_right
from vila_ops.eval.rows import ItemRow
from vila_ops.generate.request import Prompt

if TYPE_CHECKING:
    from vila_ops.data.text.conversation import Tokenizer

REVISION = 1
NAME, UNIT = "new_names", "share right"
NAMES = (("dax", "wug"), ("blick", "fep"), ("toma", "gorp"), ("zib", "pilk"), ("modi", "koba"))
"""Pairs of names that are no words; items take them in turn."""
SENTENCE = "This is a {name}."
Pair = tuple[bytes, bytes]
"""An image of the first and one of the second name."""


@dataclass(frozen=True, kw_only=True)
class NamedItem(ImageItem):
    """A held-out object, two names, and what demonstrations and questions show of each."""

    names: tuple[str, str]
    demonstrations: tuple[Pair, ...]
    misleading: tuple[Pair, ...]
    """The control's, which say nothing about the questions."""
    questions: Pair
    second_first: bool
    """Whether the first pair of demonstrations begins with the second name."""


def read(source: HeldOut, config: NewNames) -> tuple[NamedItem, ...]:
    """An item for each held-out image. Raises ValueError for too few of them."""
    items = image_items(source.inputs, "new")
    if len(items) < (least := config.least_objects()):
        raise ValueError(
            f"new_names shows {least} held-out objects in an item, and there are {len(items)}; enlarge the split, or "
            f"leave it out of the suite"
        )
    return tuple(_named(number, items, config) for number in range(len(items)))


def _named(number: int, items: Sequence[ImageItem], config: NewNames) -> NamedItem:
    """The item of an image, with the images that follow it in a circle."""
    own, second, third, fourth, fifth = (items[(number + place) % len(items)].image for place in range(5))
    demonstrations: tuple[Pair, ...]
    misleading: tuple[Pair, ...]
    if config.rule == "object":
        demonstrations, misleading = ((own, second),) * 2, ((third, fourth),) * 2
        questions = mirrored(own), mirrored(second)
    else:
        demonstrations = (second, fourfold(third)), (fourth, fourfold(fifth))
        misleading = (second, third), (fourfold(fourth), fourfold(fifth))
        questions = own, fourfold(own)
    names = NAMES[number % len(NAMES)]
    return NamedItem(
        **{**vars(items[number]), "references": {"names": names}},
        names=names,
        demonstrations=demonstrations[: config.shots // 2],
        misleading=misleading[: config.shots // 2],
        questions=questions,
        second_first=number % 2 == 1,
    )


def requests(items: Sequence[NamedItem], config: NewNames, tokenizer: LazyTokenizer) -> list[ScoreRequest]:
    """The likelihoods of both names for an image of each; `rotation` says of which name the image is."""
    return [
        ScoreRequest(
            item=item.id,
            condition=condition,
            rotation=rotation,
            prompt=_prompt(item, pairs, question, tokenizer()),
            continuations=tuple(tokenizer().text_ids(SENTENCE.format(name=name)) for name in item.names),
        )
        for item in items
        for condition, pairs in _by_condition(item, config).items()
        for rotation, question in enumerate(item.questions)
    ]


def _by_condition(item: NamedItem, config: NewNames) -> dict[str, tuple[Pair, ...]]:
    matched = {"matched": item.demonstrations}
    return matched if config.control == "none" else {**matched, "shuffled": item.misleading}


def _prompt(item: NamedItem, pairs: Sequence[Pair], question: bytes, tokenizer: "Tokenizer") -> Prompt:
    """A running text: each image with its sentence on a line of its own, and the question's image."""
    ids, images = list(tokenizer.bos), list[bytes]()
    for image, name in _in_order(item, pairs):
        ids += [*tokenizer.image, *tokenizer.text_ids(f"{SENTENCE.format(name=name)}\n")]
        images.append(image)
    return Prompt([*ids, *tokenizer.image], (*images, question))


def _in_order(item: NamedItem, pairs: Sequence[Pair]) -> Iterator[tuple[bytes, str]]:
    """The demonstrations; every second pair begins with the other name."""
    for number, pair in enumerate(pairs):
        shown = list(zip(pair, item.names, strict=True))
        yield from reversed(shown) if item.second_first != (number % 2 == 1) else shown


def score(items: Sequence[NamedItem], rows: Sequence[ItemRow], config: NewNames) -> list[Mapping[str, float]]:
    """By how many nats the first name is likelier than the second."""
    return [{"first_name": row.response.nats[1] - row.response.nats[0]} for row in rows]


def metrics(items: Sequence[NamedItem], rows: Sequence[ItemRow], config: NewNames) -> list[MetricValues]:
    """The share of items whose names go with their images, the margin in nats, and the chance level of one half.

    The first name has to gain from an image of it, compared with an image of the second name. So it does not matter
    which name the model likes better, or which one stands nearer.
    """
    values = []
    for role, own in of_condition(rows).items():
        by_item: dict[str, dict[int, ItemRow]] = {}
        for row in own:
            by_item.setdefault(row.item, {})[row.rotation] = row
        both = [of for of in by_item.values() if len(of) == 2]
        units = Units.of([of[0] for of in both])
        gains = np.array([of[0].scores["first_name"] - of[1].scores["first_name"] for of in both])
        right = np.array([share_right((gain, 0.0), item=of[0].item) for gain, of in zip(gains, both, strict=True)])
        values.append(MetricValues(NAME, units, right, role=role, unit=UNIT))
        values.append(MetricValues(f"{NAME}_margin", units, gains / 2, role=role, unit="nats"))
        if role == "model":
            values.append(MetricValues(NAME, units, np.full(len(both), 1 / 2), role="chance", unit=UNIT))
    return values


def mirrored(square: bytes) -> bytes:
    """An encoded square, left and right exchanged."""
    return _encoded(ImageOps.mirror(_decoded(square)))


def fourfold(square: bytes) -> bytes:
    """An encoded square of four copies of one, each of half its side."""
    image = _decoded(square)
    width, height = image.width // 2, image.height // 2
    sheet = Pillow.new("RGB", image.size, "white")
    for place in product((0, width), (0, height)):
        sheet.paste(image.resize((width, height)), place)
    return _encoded(sheet)


def _decoded(square: bytes) -> Pillow.Image:
    return Pillow.open(io.BytesIO(square), formats=("WEBP", "JPEG", "PNG")).convert("RGB")


def _encoded(image: Pillow.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()
