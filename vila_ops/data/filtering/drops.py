"""The table of dropped records that every rule over the whole mixture returns."""

# D dropped records

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

DROPS = pa.schema([("record", pa.int64()), ("reason", pa.string()), ("twin", pa.int64())])
"""record: number of the dropped record. twin: number of the record that it duplicates, an earlier one, or for
contamination one of the evaluation sets; null for other reasons."""


def drops_table(records: NDArray[np.int64], reason: str, twins: NDArray[np.int64] | None = None) -> pa.Table:
    """Records (D,) dropped for one reason, with their twins (D,) if the reason has any, as DROPS."""
    twin = pa.nulls(len(records), pa.int64()) if twins is None else pa.array(twins, pa.int64())
    reasons = pa.array([reason] * len(records), pa.string())
    return pa.table([pa.array(records, pa.int64()), reasons, twin], schema=DROPS)


def without(signatures: pa.Table, drops: pa.Table) -> pa.Table:
    """The rows of the records that are not in `drops`."""
    return signatures.filter(pc.invert(pc.is_in(signatures["record"], value_set=drops["record"].combine_chunks())))
