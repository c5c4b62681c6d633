"""Signatures: a few numbers for each record in which copies agree. Pure: the same record, the same numbers."""

# I images, W words, N n-grams, K minima

import hashlib
import re
import unicodedata
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image as Pillow

from vila_ops.config.clean import MAX_IMAGE_BITS, Clean, NearDuplicates
from vila_ops.config.mixture import Contamination
from vila_ops.data.cleaning.clean import clean, score_sum
from vila_ops.data.containers import BadImage
from vila_ops.data.images import rgb
from vila_ops.data.records import Image, Record

THUMBNAIL_SIDE = 4
THUMBNAIL_BYTES = 3 * THUMBNAIL_SIDE**2
MINIMA = 128
"""The estimate of a Jaccard similarity J has a standard deviation of sqrt(J (1 - J) / 128), at most 0.044."""
SHINGLE_WORDS = 5
MIN_WORDS_BESIDE_IMAGES = 20
"""Shorter texts recur under other images ("What colour is the car? Red."): they make no record a duplicate."""

SCHEMA = pa.schema(
    [
        ("record", pa.int64()),
        ("file", pa.int64()),
        ("rank", pa.float64()),
        ("is_clean", pa.bool_()),
        ("hashes", pa.list_(pa.uint64())),
        ("thumbnails", pa.list_(pa.binary(THUMBNAIL_BYTES))),
        ("minima", pa.binary(2 * MINIMA)),
        ("ngrams", pa.list_(pa.uint64())),
    ]
)

_DEAD_ZONE = 128.0
"""A cosine of half a grey level over 32 x 32 pixels: what re-encoding makes of nothing."""
_MIN_ONES = MAX_IMAGE_BITS // 2 + 2
"""Two images with fewer bits set, of which the mean's is set always, never differ in more than MAX_IMAGE_BITS."""
_SIDE = 128
"""Pixels of the shorter side that are enough: more cost time and change no hash by more than a bit or two."""
_UNSPACED = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
"""Letters and digits; in Chinese and Japanese, which set no spaces, each character is a word."""
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Wanted:
    """The rules that decide by signatures, and so what a signature must hold."""

    clean: Clean
    near_duplicates: NearDuplicates | None = None
    contamination: Contamination | None = None
    known_ngrams: NDArray[np.uint64] | None = None
    """(N,), sorted: of the evaluation sets (duplicates.known_ngrams), of which a training record keeps those it has.
    None for a record of an evaluation set, which keeps all of its own."""


@dataclass(frozen=True)
class Signature:
    """One row of the table that the global decisions are made on."""

    record: int
    """Number in the order of sources, files and lines."""
    file: int
    """Number of its raw file."""
    rank: float | None = None
    """Sum of the top_share columns."""
    is_clean: bool = True
    """False where a rule about the record alone drops it: it is ranked in its file, and otherwise not there."""
    hashes: tuple[int, ...] = ()
    thumbnails: tuple[bytes, ...] = ()
    minima: bytes | None = None
    """MINIMA uint16 of the text's word 5-grams."""
    ngrams: tuple[int, ...] = ()


def signature(record: Record, wanted: Wanted, *, number: int, file: int) -> Signature:
    """What the wanted rules need to know of a record; an unreadable image makes it unclean, as writing will find."""
    top_share = wanted.clean.top_share
    rank = score_sum(record, top_share.columns) if top_share else None
    kept = clean(record, wanted.clean).record
    if not isinstance(kept, Record):
        return Signature(number, file, rank, is_clean=False)
    parts = [part for turn in kept.turns for part in turn.parts]
    images = [part for part in parts if isinstance(part, Image)]
    words = word_hashes(" ".join(part for part in parts if isinstance(part, str)))
    near, gate = wanted.near_duplicates, wanted.contamination
    seen: list[tuple[int, bytes]] = []
    if gate or (near and near.image_bits is not None):
        try:
            seen = [image_signature(image.data) for image in images]
        except BadImage:
            return Signature(number, file, rank, is_clean=False)
    return Signature(
        number,
        file,
        rank,
        hashes=tuple(value for value, _ in seen),
        thumbnails=tuple(thumbnail for _, thumbnail in seen),
        minima=_minima(words, beside=images) if near and near.text_similarity is not None else None,
        ngrams=_ngrams(words, gate, wanted.known_ngrams, beside=images) if gate else (),
    )


def _minima(words: NDArray[np.uint64], *, beside: list[Image]) -> bytes | None:
    if len(words) < (MIN_WORDS_BESIDE_IMAGES if beside else 1):
        return None
    return minhash(ngram_hashes(words, size=min(SHINGLE_WORDS, len(words)))).tobytes()


def _ngrams(
    words: NDArray[np.uint64], gate: Contamination, known: NDArray[np.uint64] | None, *, beside: list[Image]
) -> tuple[int, ...]:
    """Of a short text itself as a whole, but nothing where it stands beside images."""
    if len(words) < gate.ngram_words and beside:
        return ()
    ngrams = np.unique(ngram_hashes(words, size=min(gate.ngram_words, len(words))))
    return tuple((ngrams if known is None else ngrams[is_in_sorted(ngrams, known)]).tolist())


def table(signatures: Iterable[Signature]) -> pa.Table:
    """Signatures as rows of SCHEMA."""
    return pa.Table.from_pylist([vars(one) for one in signatures], schema=SCHEMA)


def image_signature(data: bytes) -> tuple[int, bytes]:
    """64-bit perceptual hash and 4 x 4 RGB thumbnail of an encoded image. Raises BadImage.

    An image with next to no structure (one colour, a faint shade) gets a hash of its bytes instead: all such images
    look alike, so only its exact copies are the same.
    """
    image = rgb(data, at_least=_SIDE)
    if (factor := min(image.size) // _SIDE) > 1:
        image = image.reduce(factor)
    thumbnail = image.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Pillow.Resampling.BOX).tobytes()
    value = perceptual_hash(image)
    if value.bit_count() < _MIN_ONES:
        value = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
    return value, thumbnail


def perceptual_hash(image: Pillow.Image) -> int:
    """The DCT hash of imagehash.phash, but a bit is set only where the coefficient is clear of the median.

    Coefficients that are zero but for noise, as the odd ones of a symmetric image, fall on either side of the median
    as the encoder likes; a dead zone of half a grey level keeps their bits at 0. Of 5 800 renders, photos and
    screenshots re-encoded as WebP of quality 30 to 95, 99.9 % are then within 6 of 64 bits instead of 98.6 %.
    """
    grey = image.convert("L").resize((32, 32), Pillow.Resampling.LANCZOS)
    coefficients = _cosines() @ np.asarray(grey, np.float64) @ _cosines().T
    bits = coefficients > np.median(coefficients) + _DEAD_ZONE
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def word_hashes(text: str) -> NDArray[np.uint64]:
    """One number a word (W,), the same for any case, punctuation, spacing and compatibility form."""
    words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return np.fromiter((zlib.crc32(word.encode("utf-8", "replace")) for word in words), np.uint64, count=len(words))


def ngram_hashes(words: NDArray[np.uint64], *, size: int) -> NDArray[np.uint64]:
    """A 64-bit number for every run of `size` words: (W,) -> (W - size + 1,); sizes never mix. Nothing of no words."""
    count = len(words) - size + 1
    if count < 1 or size < 1:
        return np.empty(0, np.uint64)
    total = np.full(count, size, np.uint64)
    for place in range(size):
        total = mix(total + words[place : place + count])
    return total


def minhash(shingles: NDArray[np.uint64]) -> NDArray[np.uint16]:
    """For each of K random functions the smallest value of the shingles, its low 16 bits: (N,) -> (K,), N at least 1.

    Two sets agree in a share of the K that estimates their Jaccard similarity (Broder 1997); by chance in 1 / 65536.
    """
    multipliers, offsets = _functions()
    smallest = np.full(MINIMA, np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(shingles), 1024):  # so that a long text stays in the processor's cache
        values = shingles[None, start : start + 1024] * multipliers[:, None] + offsets[:, None]
        smallest = np.minimum(smallest, values.min(axis=1))
    return (smallest >> np.uint64(24)).astype(np.uint16)  # the lowest bits of a product hardly vary


def is_in_sorted(values: NDArray[np.uint64], known: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """For each value whether it is among the known ones, which are sorted."""
    place = np.searchsorted(known, values)
    found = np.zeros(len(values), np.bool_)
    inside = place < len(known)
    found[inside] = known[place[inside]] == values[inside]
    return found


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's step: every bit of the value moves every bit of the result."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@lru_cache(maxsize=1)
def _cosines() -> NDArray[np.float64]:
    """The 8 lowest of the 32 basis functions of the DCT-II, (8, 32)."""
    return np.cos(np.pi * np.arange(8)[:, None] * (2 * np.arange(32) + 1) / 64)


@lru_cache(maxsize=1)
def _functions() -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Odd multipliers and offsets of K functions x -> a x + b modulo 2^64."""
    numbers = mix(np.arange(1, 2 * MINIMA + 1, dtype=np.uint64) * _FACTOR)
    return numbers[:MINIMA] | np.uint64(1), numbers[MINIMA:]
