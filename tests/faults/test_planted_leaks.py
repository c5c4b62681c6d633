"""Evaluation items planted in training data with the changes of the web: how many are detected, and how many others.

VILA_LEAKS sets the number of leaked images and texts (300; `make faults` sets more).
"""

import io
import os
import random
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import ImageDraw

from vila_ops.config.clean import Clean
from vila_ops.config.mixture import Contamination
from vila_ops.data.decontamination.contamination import contaminated, known_ngrams
from vila_ops.data.dedup.signatures import SignatureRules, signature, table
from vila_ops.data.records import Image, Part, Record, Turn

COUNT = int(os.environ.get("VILA_LEAKS", "300"))
GATE = Contamination.model_validate({"sources": {"unread": {"kind": "jsonl", "path": ".", "render": "caption"}}})

Change = Callable[[Pillow.Image, random.Random], bytes]


def record(*parts: Part) -> Record:
    return Record("id", "thing", (Turn("document", parts),), category="", licence="", provenance="")


def signed(records: list[Record], known: NDArray[np.uint64] | None) -> pa.Table:
    rules = SignatureRules(Clean(), contamination=GATE, known_ngrams=known)
    return table(signature(one, rules, number=number, file=0) for number, one in enumerate(records))


@lru_cache(maxsize=1000)
def image(seed: int) -> Pillow.Image:
    """Return a photo-like image of noise (amplitude 1 / frequency) in random colours, with some shapes on it."""
    rng = np.random.default_rng(seed)
    size = tuple(int(side) for side in rng.integers(96, 320, 2))
    field = np.zeros((size[1], size[0], 3), np.float32)
    for cells in (2, 4, 8, 16, 32):
        octave = rng.normal(0, 1 / cells, (cells, cells, 3)).astype(np.float32)
        planes = [Pillow.fromarray(octave[..., c]).resize(size, Pillow.Resampling.BICUBIC) for c in range(3)]
        field += np.stack([np.asarray(plane) for plane in planes], axis=-1)
    whole = Pillow.fromarray((128 + 110 * np.tanh(field)).astype(np.uint8))
    draw = ImageDraw.Draw(whole)
    for _ in range(rng.integers(1, 6)):
        x, y = (int(rng.integers(0, side)) for side in size)
        box = (x, y, x + int(rng.integers(10, size[0] // 2)), y + int(rng.integers(10, size[1] // 2)))
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        (draw.ellipse if rng.random() < 0.5 else draw.rectangle)(box, fill=colour)
    return whole


def encoded(whole: Pillow.Image, kind: str, **more: int) -> bytes:
    out = io.BytesIO()
    whole.save(out, kind, **more)
    return out.getvalue()


def resized(whole: Pillow.Image, draw: random.Random) -> Pillow.Image:
    scale = draw.uniform(0.25, 2)
    filters = (Pillow.Resampling.BILINEAR, Pillow.Resampling.BICUBIC, Pillow.Resampling.LANCZOS)
    return whole.resize((round(whole.width * scale), round(whole.height * scale)), draw.choice(filters))


CHANGES: dict[str, Change] = {
    "resized": lambda whole, draw: encoded(resized(whole, draw), "BMP"),
    "jpeg": lambda whole, draw: encoded(whole, "JPEG", quality=draw.randint(30, 95)),
    "webp": lambda whole, draw: encoded(whole, "WEBP", quality=draw.randint(30, 95)),
    "resized jpeg": lambda whole, draw: encoded(resized(whole, draw), "JPEG", quality=draw.randint(30, 95)),
    "resized webp": lambda whole, draw: encoded(resized(whole, draw), "WEBP", quality=draw.randint(30, 95)),
}


@pytest.fixture(scope="module")
def evaluation() -> pa.Table:
    return signed([record(Image(encoded(image(seed), "BMP"))) for seed in range(COUNT)], None)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CHANGES)
def test_copies_of_evaluation_images_are_found_and_no_others(kind: str, evaluation: pa.Table) -> None:
    draw = random.Random(kind)
    copies = [record(Image(CHANGES[kind](image(seed), draw))) for seed in range(COUNT)]
    others = [record(Image(CHANGES[kind](image(COUNT + seed), draw))) for seed in range(COUNT)]
    detected = contaminated(signed(copies + others, known_ngrams(evaluation)), evaluation, GATE)
    right = [row["record"] for row in detected.to_pylist() if row["record"] == row["twin"]]
    assert len(right) >= 0.99 * COUNT, "recall"
    assert len(right) >= 0.99 * len(detected), "precision"


def sentence(draw: random.Random, words: int) -> list[str]:
    """Return words of a small vocabulary, by a Zipf distribution as in a language."""
    ranks = range(1, 401)
    return [f"w{rank}" for rank in draw.choices(ranks, [1 / rank for rank in ranks], k=words)]


def dressed(words: list[str], draw: random.Random) -> str:
    """Return the same words in other case, punctuation and spacing."""
    shown = [draw.choice((str, str.upper, str.title))(word) for word in words]
    return "".join(word + draw.choice((" ", ", ", " - ", ".\n", '" ', "  ")) for word in shown)


@pytest.mark.slow
def test_evaluation_texts_inside_longer_ones_are_found_and_no_others() -> None:
    draw = random.Random(0)
    questions = [sentence(draw, draw.randint(13, 40)) for _ in range(COUNT)]
    known = signed([record(" ".join(words)) for words in questions], None)
    leaks = [
        record(dressed(sentence(draw, draw.randint(0, 200)) + words + sentence(draw, draw.randint(0, 200)), draw))
        for words in questions
    ]
    others = [record(dressed(sentence(draw, draw.randint(13, 300)), draw)) for _ in range(10 * COUNT)]
    detected = contaminated(signed(leaks + others, known_ngrams(known)), known, GATE).to_pylist()
    right = [row for row in detected if row["record"] == row["twin"] and row["reason"] == "contaminated_text"]
    assert len(right) >= 0.99 * COUNT, "recall"
    assert len(right) >= 0.99 * len(detected), "precision"


def test_short_evaluation_texts_are_found_where_they_are_the_whole_text_only() -> None:
    draw = random.Random(1)
    questions = [[*sentence(draw, draw.randint(5, 11)), f"name{number}"] for number in range(COUNT)]
    known = signed([record(" ".join(words)) for words in questions], None)
    whole = [record(dressed(words, draw)) for words in questions]
    inside = [record(dressed(["so", *words], draw)) for words in questions]
    detected = contaminated(signed(whole + inside, known_ngrams(known)), known, GATE)
    assert detected["record"].to_pylist() == detected["twin"].to_pylist() == list(range(COUNT))
