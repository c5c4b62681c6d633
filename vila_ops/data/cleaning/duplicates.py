"""Decisions that need all records: top share of a file, contamination, near duplicates. Columns in, drops out.

Whether a record is dropped depends on records before it only, so a file that is added at the end never changes what
earlier files keep. That is why groups are not merged (by union-find): a late record between two would join them.
"""

# N n-grams

from collections.abc import Mapping
from math import floor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from vila_ops.config.clean import NearDuplicates, TopShare
from vila_ops.config.mixture import Contamination
from vila_ops.data.cleaning.neighbours import ImageSignatures, first_copies, first_similar
from vila_ops.data.cleaning.similarity import MINIMA, THUMBNAIL_BYTES, is_in_sorted

DROPS = pa.schema([("record", pa.int64()), ("reason", pa.string()), ("twin", pa.int64())])
"""A record's number, why it goes, and the number of the record that it collides with: an earlier one, for contamination
one of the evaluation sets; null where there is none."""

TEMPLATE_RECORDS = 10
"""An n-gram of more evaluation records than this is how the set words its questions, not what it asks (GPT-3's rule for
13-grams of more than ten documents)."""


def decide(
    signatures: pa.Table,
    *,
    shares: Mapping[int, TopShare],
    evaluation: pa.Table | None,
    contamination: Contamination | None,
    near_duplicates: NearDuplicates | None,
) -> pa.Table:
    """All drops (DROPS), each record once: each rule looks at what the rules before it left.

    `shares` by number of the raw file. Tables as of similarity.SCHEMA, in any order of rows.
    """
    drops = [top_share(signatures, shares)]
    left = without(signatures, drops[0])
    if contamination and evaluation is not None:
        drops.append(contaminated(left, evaluation, contamination))
        left = without(left, drops[-1])
    if near_duplicates:
        drops.append(duplicated(left, near_duplicates))
    return pa.concat_tables(drops)


def without(signatures: pa.Table, drops: pa.Table) -> pa.Table:
    """The rows whose record was not dropped."""
    return signatures.filter(pc.invert(pc.is_in(signatures["record"], value_set=drops["record"].combine_chunks())))


def top_share(signatures: pa.Table, shares: Mapping[int, TopShare]) -> pa.Table:
    """Drops "below_top_share": the clean records that are not among their file's best; of equals the earlier is better.

    Unclean records have their place in the ranking: what other rules say moves no threshold. Records without a rank
    are not in it and never dropped here.
    """
    rows = signatures.sort_by("record")
    record, file = rows["record"].to_numpy(), rows["file"].to_numpy()
    rank, is_clean = rows["rank"].to_numpy(), rows["is_clean"].to_numpy()
    dropped = [np.empty(0, np.int64)]
    for number, rule in shares.items():
        own = np.flatnonzero((file == number) & ~np.isnan(rank))
        best_first = own[np.argsort(-rank[own], kind="stable")]
        below = best_first[floor(rule.share * len(own) + 1e-9) :]  # 0.29 * 100 is 28.999999999999996
        dropped.append(record[below[is_clean[below]]])
    return _drops(np.sort(np.concatenate(dropped)), "below_top_share", None)


def known_ngrams(evaluation: pa.Table) -> NDArray[np.uint64]:
    """The n-grams (N,) that give an evaluation set away, sorted and distinct: what Wanted.known_ngrams asks for."""
    return _telling_ngrams(evaluation)[0]


def contaminated(signatures: pa.Table, evaluation: pa.Table, rules: Contamination) -> pa.Table:
    """Drops "contaminated_image": one of the images is a copy of an evaluation image; "contaminated_text": the text
    shares an n-gram with an evaluation text that tells something.

    The signatures must have been made with known_ngrams(evaluation), else they lack what is to be found.
    """
    own, known = _images(signatures), _images(evaluation)
    found = first_copies(own, among=known, bits=rules.image_bits)
    copies = np.flatnonzero(found >= 0)
    records, first = np.unique(own.record[copies], return_index=True)
    by_image = _drops(records, "contaminated_image", known.record[found[copies[first]]])
    ngrams, owners = _telling_ngrams(evaluation)
    record, values = _lists(_clean_rows(without(signatures, by_image)), "ngrams")
    shared = np.flatnonzero(is_in_sorted(values, ngrams))
    records, first = np.unique(record[shared], return_index=True)
    twins = owners[np.searchsorted(ngrams, values[shared[first]])]
    return pa.concat_tables([by_image, _drops(records, "contaminated_text", twins)])


def duplicated(signatures: pa.Table, rules: NearDuplicates) -> pa.Table:
    """Drops "duplicate_image": every image is a copy of one in an earlier record; then, of what is left,
    "duplicate_text": the text is as similar to an earlier one as the rules say."""
    drops = _drops(np.empty(0, np.int64), "duplicate_image", np.empty(0, np.int64))
    if rules.image_bits is not None:
        images = _images(signatures)
        found = first_copies(images, among=None, bits=rules.image_bits)
        records, first = np.unique(images.record, return_index=True)
        all_found = np.logical_and.reduceat(found >= 0, first) if len(first) else np.empty(0, np.bool_)
        drops = _drops(records[all_found], "duplicate_image", images.record[found[first[all_found]]])
    if rules.text_similarity is None:
        return drops
    rows = _clean_rows(without(signatures, drops))
    rows = rows.filter(rows["minima"].is_valid())
    record = rows["record"].to_numpy()
    minima = _bytes(rows["minima"].combine_chunks(), width=2 * MINIMA).view(np.uint16)
    found = first_similar(minima, similarity=rules.text_similarity)
    copies = np.flatnonzero(found >= 0)
    return pa.concat_tables([drops, _drops(record[copies], "duplicate_text", record[found[copies]])])


def _telling_ngrams(evaluation: pa.Table) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Distinct n-grams (N,), sorted, without the set's templates, and the first record (N,) that has each."""
    record, values = _lists(_clean_rows(evaluation), "ngrams")
    ngrams, first, records = np.unique(values, return_index=True, return_counts=True)
    telling = records <= TEMPLATE_RECORDS
    return ngrams[telling], record[first[telling]]


def _images(signatures: pa.Table) -> ImageSignatures:
    rows = _clean_rows(signatures)
    record, hashes = _lists(rows, "hashes")
    thumbnails = _bytes(rows["thumbnails"].combine_chunks().flatten(), width=THUMBNAIL_BYTES)
    return ImageSignatures(record=record, hashes=hashes, thumbnails=thumbnails)


def _clean_rows(signatures: pa.Table) -> pa.Table:
    return signatures.filter(signatures["is_clean"]).sort_by("record")


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


def _drops(records: NDArray[np.int64], reason: str, twins: NDArray[np.int64] | None) -> pa.Table:
    twin = pa.nulls(len(records), pa.int64()) if twins is None else pa.array(twins, pa.int64())
    reasons = pa.array([reason] * len(records), pa.string())
    return pa.table([pa.array(records, pa.int64()), reasons, twin], schema=DROPS)
