"""All rules over the whole mixture, in their order: top share, contamination, near duplicates."""

from collections.abc import Mapping

import pyarrow as pa

from vila_ops.config.clean import NearDuplicates, TopShare
from vila_ops.config.mixture import Contamination
from vila_ops.data.decontamination.contamination import contaminated
from vila_ops.data.dedup.near_duplicates import near_duplicates
from vila_ops.data.filtering.drops import without
from vila_ops.data.filtering.top_share import top_share


def decide(
    signatures: pa.Table,
    *,
    shares: Mapping[int, TopShare],
    evaluation: pa.Table | None,
    contamination: Contamination | None,
    duplicates: NearDuplicates | None,
) -> pa.Table:
    """All drops (filtering.drops.DROPS), each record once: each rule looks only at what the rules before it left.

    `shares` is by number of the raw file. The tables have dedup.signatures.SCHEMA; the order of rows does not matter.
    """
    drops = [top_share(signatures, shares)]
    left = without(signatures, drops[0])
    if contamination and evaluation is not None:
        drops.append(contaminated(left, evaluation, contamination))
        left = without(left, drops[-1])
    if duplicates:
        drops.append(near_duplicates(left, duplicates))
    return pa.concat_tables(drops)
