"""Contamination: training records that show an image, or contain an n-gram, of an evaluation set."""

# N n-grams

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vila_ops.config.mixture import Contamination
from vila_ops.data.dedup.hashing import is_in_sorted
from vila_ops.data.dedup.neighbours import first_copies
from vila_ops.data.dedup.signatures import clean_rows, images_of, ngrams_of
from vila_ops.data.filtering.drops import drops_table, without

TEMPLATE_RECORDS = 10
"""An n-gram of more evaluation records than this is the wording of the set's questions, not their content (GPT-3's
rule for 13-grams of more than ten documents)."""


def known_ngrams(evaluation: pa.Table) -> NDArray[np.uint64]:
    """The n-grams (N,) that identify an evaluation set, sorted and distinct, for SignatureRules.known_ngrams."""
    return _identifying_ngrams(evaluation)[0]


def contaminated(signatures: pa.Table, evaluation: pa.Table, rules: Contamination) -> pa.Table:
    """Drops "contaminated_image": one of the images is a copy of an evaluation image; "contaminated_text": the text
    shares an identifying n-gram with an evaluation text.

    The signatures must have been computed with known_ngrams(evaluation): others lack the n-grams that are compared.
    """
    images, known = images_of(signatures), images_of(evaluation)
    matches = first_copies(images, among=known, bits=rules.image_bits)
    copies = np.flatnonzero(matches >= 0)
    records, first = np.unique(images.record[copies], return_index=True)
    by_image = drops_table(records, "contaminated_image", known.record[matches[copies[first]]])
    ngrams, owners = _identifying_ngrams(evaluation)
    record, values = ngrams_of(clean_rows(without(signatures, by_image)))
    shared = np.flatnonzero(is_in_sorted(values, ngrams))
    records, first = np.unique(record[shared], return_index=True)
    twins = owners[np.searchsorted(ngrams, values[shared[first]])]
    return pa.concat_tables([by_image, drops_table(records, "contaminated_text", twins)])


def _identifying_ngrams(evaluation: pa.Table) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Distinct n-grams (N,), sorted, without the set's templates, and the first record (N,) that has each."""
    record, values = ngrams_of(clean_rows(evaluation))
    ngrams, first, records = np.unique(values, return_index=True, return_counts=True)
    identifying = records <= TEMPLATE_RECORDS
    return ngrams[identifying], record[first[identifying]]
