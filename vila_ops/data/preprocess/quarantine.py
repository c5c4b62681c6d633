"""Quarantined records of a mixture: their samples are removed from the index, their bytes stay in the shards.

So no shard is rebuilt, and every other sample keeps its key, its split and its bytes.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vila_ops.artifacts import store
from vila_ops.artifacts.kinds import Dataset
from vila_ops.config import Mixture
from vila_ops.data.shards import DROPPED, DROPPED_SCHEMA

REASON = "quarantined"


class Quarantined:
    """Removes quarantined records from the indexes of a mixture's shards, one after the other."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture
        self._places: dict[tuple[str, str], list[str]] = {}
        """The locations of the samples of each record (source, id) that occurred."""

    def leave_out(self, source: str, index: pa.Table, counts: dict[str, Any]) -> pa.Table:
        """The index of a shard without quarantined records, which are subtracted from its counts."""
        if source not in self.mixture.quarantine:
            return index
        out = pc.is_in(index["id"], pa.array(self.mixture.quarantine[source], pa.string()))
        rows = index.filter(out).to_pylist()
        counts["samples"] = _without(counts["samples"], rows, "split", None)
        for key, column in (("tokens", "num_tokens"), ("images", "num_images")):
            left = _without(counts[key], rows, "split", column)
            counts[key] = {split: left.get(split, 0) for split in counts["samples"]}
        counts["licences"] = _without(counts["licences"], rows, "licence", None)
        for row in rows:
            self._places.setdefault((source, row["id"]), []).append(f"{row['shard']}:{row['key']}")
        if rows:
            counts["taken_out"][REASON] = len({row["id"] for row in rows})
        return index.filter(pc.invert(out))

    def dropped(self) -> Iterator[pa.Table]:
        """The quarantined records as rows of the list of dropped records; call it after all shards.

        Raises ValueError for a record that has no sample in any shard, unless it may have been taken down since.
        """
        named = [(source, one) for source, ids in self.mixture.quarantine.items() for one in ids]
        pairs = [pair for pair in named if pair in self._places or pair[0] not in self.mixture.removed]
        if unknown := [pair for pair in pairs if pair not in self._places]:
            source, one = unknown[0]
            raise ValueError(
                f"mixture {self.mixture.name!r}: quarantine names {one!r} of source {source!r}, of which there is no "
                f"sample ({len(unknown)} such in all); remove it from quarantine, or correct its id"
            )
        rows = [
            {"source": source, "id": one, "reason": REASON, "where": " ".join(self._places[source, one]), "detail": ""}
            for source, one in pairs
        ]
        yield pa.Table.from_pylist(rows, schema=DROPPED_SCHEMA)


def left_out(dataset: Dataset) -> dict[str, tuple[str, str]]:
    """Source and id of the record of each sample, by its key, that quarantine left out of a dataset."""
    quarantined = pc.field("reason") == REASON
    rows = pq.read_table(store.file(dataset, DROPPED), filters=quarantined).to_pylist()
    return {place.rpartition(":")[2]: (row["source"], row["id"]) for row in rows for place in row["where"].split()}


def _without(counts: dict[str, int], rows: list[dict[str, Any]], key: str, column: str | None) -> dict[str, int]:
    """Counts by a key of the rows, minus these rows; a row counts as its value in `column`, or 1."""
    taken: Counter[str] = Counter()
    for row in rows:
        taken[row[key]] += 1 if column is None else row[column]
    return {name: left for name, count in counts.items() if (left := count - taken[name])}
