"""Near duplicates: records whose images or text nearly equal those of an earlier record.

Whether a record is dropped depends only on records before it, so a file that is added at the end never changes what
earlier files keep. Groups are not merged (by union-find) for that reason: a late record between two would join them.
"""

import numpy as np
import pyarrow as pa

from vila_ops.config.clean import NearDuplicates
from vila_ops.data.dedup.neighbours import first_copies, first_similar
from vila_ops.data.dedup.signatures import clean_rows, images_of, minima_of
from vila_ops.data.filtering.drops import drops_table, without


def near_duplicates(signatures: pa.Table, rules: NearDuplicates) -> pa.Table:
    """Drops "duplicate_image": every image is a copy of one in an earlier record; then, among the rest,
    "duplicate_text": the text is at least as similar to an earlier one as the rules say."""
    drops = drops_table(np.empty(0, np.int64), "duplicate_image", np.empty(0, np.int64))
    if rules.image_bits is not None:
        images = images_of(signatures)
        copies = first_copies(images, among=None, bits=rules.image_bits)
        records, first = np.unique(images.record, return_index=True)
        are_copies = np.logical_and.reduceat(copies >= 0, first) if len(first) else np.empty(0, np.bool_)
        drops = drops_table(records[are_copies], "duplicate_image", images.record[copies[first[are_copies]]])
    if rules.text_similarity is None:
        return drops
    rows = clean_rows(without(signatures, drops))
    rows = rows.filter(rows["minima"].is_valid())
    record = rows["record"].to_numpy()
    similar = first_similar(minima_of(rows), similarity=rules.text_similarity)
    copies = np.flatnonzero(similar >= 0)
    return pa.concat_tables([drops, drops_table(record[copies], "duplicate_text", record[similar[copies]])])
