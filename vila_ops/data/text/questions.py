"""Captioned images to visual questions with answers that follow from object names. Pure."""

import random
from dataclasses import dataclass, replace

from vila_ops.data.records import Image, Record, Turn

DESCRIBE = ("What is this?", "What does the picture show?", "Describe the picture.", "What do you see?")
YES_NO = "Is there a {name} in the image? Answer yes or no."


@dataclass(frozen=True)
class ObjectNames:
    """Object names by category of one source and one split, from which wrong answers are drawn."""

    by_category: dict[str, tuple[str, ...]]

    def other(self, record: Record, draw: random.Random) -> str:
        """The name of another object: of the same category in half of the cases, else of any."""
        near = [name for name in self.by_category.get(record.category, ()) if name != record.object]
        every = [name for names in self.by_category.values() for name in names if name != record.object]
        if not every:
            raise ValueError(f"record {record.id!r}: its source has no other object to ask about")
        return draw.choice(near if near and draw.random() < 0.5 else every)


def questions(record: Record, names: ObjectNames, *, seed: int) -> list[Record]:
    """Two conversations about one captioned image: a question for a description, and a yes-or-no question.

    Yes and no are equally likely; the draw depends only on the seed and the record's id.
    """
    draw = random.Random(f"{seed}/{record.id}")
    parts = [part for turn in record.turns for part in turn.parts]
    images = [part for part in parts if isinstance(part, Image)]
    caption = " ".join(part for part in parts if isinstance(part, str))
    if len(record.turns) != 1 or len(images) != 1 or not caption:
        raise ValueError(f"record {record.id!r} is not one image with a caption, which render questions needs")
    image = images[0]
    describe = (Turn("user", (image, draw.choice(DESCRIBE))), Turn("assistant", (caption,)))
    question, answer = _yes_no(record, names, draw)
    yes_no = (Turn("user", (image, question)), Turn("assistant", (answer,)))
    return [
        replace(record, id=f"{record.id}#describe", turns=describe),
        replace(record, id=f"{record.id}#yes_no", turns=yes_no),
    ]


def _yes_no(record: Record, names: ObjectNames, draw: random.Random) -> tuple[str, str]:
    is_there = draw.random() < 0.5
    name = record.object if is_there else names.other(record, draw)
    return YES_NO.format(name=name), "Yes." if is_there else "No."
