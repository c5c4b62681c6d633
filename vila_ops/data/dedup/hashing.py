"""Hashes that nearly equal images and texts share: perceptual hash, thumbnail, word n-grams, MinHash. Pure."""

# W words, N n-grams, K minima

import hashlib
import re
import unicodedata
import zlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from vila_ops.config.clean import MAX_IMAGE_BITS
from vila_ops.config.images import ImageReading
from vila_ops.data.images import READING, rgb

THUMBNAIL_SIDE = 4
THUMBNAIL_BYTES = 3 * THUMBNAIL_SIDE**2
MINIMA = 128
"""K. The estimate of a Jaccard similarity J has a standard deviation of sqrt(J (1 - J) / 128), at most 0.044."""
_DEAD_ZONE = 128.0
"""A cosine of half a grey level over 32 x 32 pixels: the size of coefficients that are only encoding noise."""
_MIN_ONES = MAX_IMAGE_BITS // 2 + 2
"""Two images with fewer bits set never differ in more than MAX_IMAGE_BITS, since the mean's bit is always set."""
_SIDE = 128
"""Pixels of the shorter side that are enough: more take time and change no hash by more than a bit or two."""
_UNSPACED = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
"""Letters and digits; in Chinese and Japanese, which are written without spaces, each character is a word."""
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def image_signature(data: bytes, reading: ImageReading = READING) -> tuple[int, bytes]:
    """64-bit perceptual hash and 4 x 4 RGB thumbnail of an encoded image. Raises BadImage.

    An image with almost no structure (one colour, a faint shade) gets a hash of its bytes instead: the perceptual
    hashes of all such images are alike, so only exact copies may count as the same.
    """
    image = rgb(data, at_least=_SIDE, reading=reading)
    if (factor := min(image.size) // _SIDE) > 1:
        image = image.reduce(factor)
    thumbnail = image.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Pillow.Resampling.BOX).tobytes()
    value = perceptual_hash(image)
    if value.bit_count() < _MIN_ONES:
        value = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
    return value, thumbnail


def perceptual_hash(image: Pillow.Image) -> int:
    """The DCT hash of imagehash.phash, with a bit set only if its coefficient exceeds the median by a dead zone.

    Coefficients that are zero but for noise, such as the odd ones of a symmetric image, fall on either side of the
    median after encoding; a dead zone of half a grey level keeps their bits at 0. Of 5 800 renders, photos and
    screenshots re-encoded as WebP of quality 30 to 95, 99.9 % are then within 6 of 64 bits instead of 98.6 %.
    """
    grey = image.convert("L").resize((32, 32), Pillow.Resampling.LANCZOS)
    coefficients = _cosines() @ np.asarray(grey, np.float64) @ _cosines().T
    bits = coefficients > np.median(coefficients) + _DEAD_ZONE
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def word_hashes(text: str) -> NDArray[np.uint64]:
    """One number for each word (W,), independent of case, punctuation, spacing and compatibility form."""
    words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return np.fromiter((zlib.crc32(word.encode("utf-8", "replace")) for word in words), np.uint64, count=len(words))


def ngram_hashes(words: NDArray[np.uint64], *, size: int) -> NDArray[np.uint64]:
    """A 64-bit number for every run of `size` words: (W,) -> (W - size + 1,), empty for fewer words.

    The size enters the number, so n-grams of different sizes differ.
    """
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
    for start in range(0, len(shingles), 1024):  # a block fits the processor's cache
        values = shingles[None, start : start + 1024] * multipliers[:, None] + offsets[:, None]
        smallest = np.minimum(smallest, values.min(axis=1))
    return (smallest >> np.uint64(24)).astype(np.uint16)  # the lowest bits of a product hardly vary


def is_in_sorted(values: NDArray[np.uint64], known: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """For each value whether it is among `known`, which is sorted."""
    place = np.searchsorted(known, values)
    is_known = np.zeros(len(values), np.bool_)
    inside = place < len(known)
    is_known[inside] = known[place[inside]] == values[inside]
    return is_known


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64: every bit of a value affects every bit of the result."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@lru_cache(maxsize=1)
def _cosines() -> NDArray[np.float64]:
    """The 8 lowest of the 32 basis functions of the DCT-II, (8, 32)."""
    return np.cos(np.pi * np.arange(8)[:, None] * (2 * np.arange(32) + 1) / 64)


@lru_cache(maxsize=1)
def _functions() -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Odd multipliers (K,) and offsets (K,) of K functions x -> a x + b modulo 2^64."""
    values = mix(np.arange(1, 2 * MINIMA + 1, dtype=np.uint64) * _FACTOR)
    return values[:MINIMA] | np.uint64(1), values[MINIMA:]
