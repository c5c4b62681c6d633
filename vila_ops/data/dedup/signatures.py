"""The signature of a record: a few numbers that nearly equal records share. Pure: the same record, the same numbers."""

# T texts, K minima, P images, N n-grams

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from vila_ops.config.clean import Clean, NearDuplicates
from vila_ops.config.images import ImageReading
from vila_ops.config.mixture import Contamination
from vila_ops.data.containers import BadImage
from vila_ops.data.dedup.hashing import (
    MINIMA,
    THUMBNAIL_BYTES,
    image_signature,
    is_in_sorted,
    minhash,
    ngram_hashes,
    word_hashes,
)
from vila_ops.data.dedup.neighbours import ImageSignatures
from vila_ops.data.filtering.record_rules import filter_record, score_sum
from vila_ops.data.images import READING
from vila_ops.data.records import NOT_DOWNLOADED, Dropped, Image, Record

SHINGLE_WORDS = 5
MIN_WORDS_BESIDE_IMAGES = 20
"""Shorter texts recur under other images ("What colour is the car? Red."), so they make no record a duplicate."""
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


@dataclass(frozen=True)
class SignatureRules:
    """The rules that are decided on signatures; they say what a signature must hold."""

    clean: Clean
    near_duplicates: NearDuplicates | None = None
    contamination: Contamination | None = None
    known_ngrams: NDArray[np.uint64] | None = None
    """(N,), sorted: the n-grams of the evaluation sets (decontamination.contamination.known_ngrams). A training record
    keeps only those of its n-grams that are among them. None for a record of an evaluation set, which keeps all."""
    reading: ImageReading = READING


@dataclass(frozen=True)
class Signature:
    """One row of SCHEMA."""

    record: int
    """Number in the order of sources, files and lines."""
    file: int
    """Number of its raw file."""
    rank: float | None = None
    """Sum of the top_share columns."""
    is_clean: bool = True
    """False if a rule on the record alone drops it: it takes part in the ranking of its file and in nothing else."""
    hashes: tuple[int, ...] = ()
    thumbnails: tuple[bytes, ...] = ()
    minima: bytes | None = None
    """MINIMA uint16 of the text's word 5-grams."""
    ngrams: tuple[int, ...] = ()


def signature(record: Record, rules: SignatureRules, *, number: int, file: int) -> Signature:
    """The signature of a record for the given rules.

    A record with an unreadable image is not clean: writing its shard drops it as bad.
    """
    ranking = rules.clean.top_share
    rank = score_sum(record.scores, ranking.columns) if ranking else None
    kept = filter_record(record, rules.clean).record
    if not isinstance(kept, Record):
        return Signature(number, file, rank, is_clean=False)
    parts = [part for turn in kept.turns for part in turn.parts]
    images = [part for part in parts if isinstance(part, Image)]
    words = word_hashes(" ".join(part for part in parts if isinstance(part, str)))
    near, contamination = rules.near_duplicates, rules.contamination
    pairs: list[tuple[int, bytes]] = []
    if contamination or (near and near.image_bits is not None):
        try:
            pairs = [image_signature(image.data, rules.reading) for image in images]
        except BadImage:
            return Signature(number, file, rank, is_clean=False)
    return Signature(
        number,
        file,
        rank,
        hashes=tuple(value for value, _ in pairs),
        thumbnails=tuple(thumbnail for _, thumbnail in pairs),
        minima=_minima(words, beside=images) if near and near.text_similarity is not None else None,
        ngrams=_ngrams(words, contamination, rules.known_ngrams, beside=images) if contamination else (),
    )


def ranking_signature(dropped: Dropped, rules: SignatureRules, *, number: int, file: int) -> Signature:
    """The signature of a record that takes part in the ranking of its file alone.

    One whose image is not there counts as clean, so that it is dropped for its rank where that is too low.
    """
    ranking = rules.clean.top_share
    rank = score_sum(dropped.scores, ranking.columns) if ranking else None
    return Signature(number, file, rank, is_clean=dropped.reason == NOT_DOWNLOADED)


def table(signatures: Iterable[Signature]) -> pa.Table:
    """Signatures as rows of SCHEMA."""
    return pa.Table.from_pylist([vars(one) for one in signatures], schema=SCHEMA)


def clean_rows(signatures: pa.Table) -> pa.Table:
    """The rows of clean records, in the order of the records."""
    return signatures.filter(signatures["is_clean"]).sort_by("record")


def images_of(signatures: pa.Table) -> ImageSignatures:
    """All images of the clean records."""
    rows = clean_rows(signatures)
    record, hashes = _lists(rows, "hashes")
    thumbnails = _bytes(rows["thumbnails"].combine_chunks().flatten(), width=THUMBNAIL_BYTES)
    return ImageSignatures(record=record, hashes=hashes, thumbnails=thumbnails)


def ngrams_of(rows: pa.Table) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """The record (N,) of each n-gram, and the n-grams (N,)."""
    return _lists(rows, "ngrams")


def minima_of(rows: pa.Table) -> NDArray[np.uint16]:
    """The minima (T, K) of rows that all have some."""
    return _bytes(rows["minima"].combine_chunks(), width=2 * MINIMA).view(np.uint16)


def _minima(words: NDArray[np.uint64], *, beside: list[Image]) -> bytes | None:
    if len(words) < (MIN_WORDS_BESIDE_IMAGES if beside else 1):
        return None
    return minhash(ngram_hashes(words, size=min(SHINGLE_WORDS, len(words)))).tobytes()


def _ngrams(
    words: NDArray[np.uint64], rules: Contamination, known: NDArray[np.uint64] | None, *, beside: list[Image]
) -> tuple[int, ...]:
    """The n-grams of a text; a shorter text counts as one n-gram, but has none if it stands beside images."""
    if len(words) < rules.ngram_words and beside:
        return ()
    ngrams = np.unique(ngram_hashes(words, size=min(rules.ngram_words, len(words))))
    return tuple((ngrams if known is None else ngrams[is_in_sorted(ngrams, known)]).tolist())


def _lists(rows: pa.Table, column: str) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """The record of each value, and the values, of a column of lists."""
    lists = rows[column].combine_chunks()
    parents = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False)
    return rows["record"].to_numpy()[parents], lists.flatten().to_numpy(zero_copy_only=False)


def _bytes(values: pa.FixedSizeBinaryArray, *, width: int) -> NDArray[np.uint8]:
    """A column of fixed-size bytes without nulls as an array (rows, width)."""
    if not len(values):
        return np.empty((0, width), np.uint8)
    start = values.offset * width
    return np.frombuffer(values.buffers()[1], np.uint8)[start : start + len(values) * width].reshape(-1, width)
