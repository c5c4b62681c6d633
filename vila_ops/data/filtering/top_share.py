"""The best share of each raw file by the sum of some score columns."""

from collections.abc import Mapping
from math import floor

import numpy as np
import pyarrow as pa

from vila_ops.config.clean import TopShare
from vila_ops.data.filtering.drops import drops_table


def top_share(signatures: pa.Table, shares: Mapping[int, TopShare]) -> pa.Table:
    """Drops "below_top_share": the clean records below the top share of their file; of equal ranks the earlier wins.

    `shares` is by number of the raw file; `signatures` has the columns record, file, rank and is_clean. Unclean records
    take part in the ranking, so other rules do not move the threshold. Records without a rank take no part.
    """
    rows = signatures.sort_by("record")
    record, file = rows["record"].to_numpy(), rows["file"].to_numpy()
    rank, is_clean = rows["rank"].to_numpy(), rows["is_clean"].to_numpy()
    dropped = [np.empty(0, np.int64)]
    for number, rule in shares.items():
        ranked = np.flatnonzero((file == number) & ~np.isnan(rank))
        best_first = ranked[np.argsort(-rank[ranked], kind="stable")]
        below = best_first[floor(rule.share * len(ranked) + 1e-9) :]  # 0.29 * 100 is 28.999999999999996
        dropped.append(record[below[is_clean[below]]])
    return drops_table(np.sort(np.concatenate(dropped)), "below_top_share")
