"""Who holds some records: the datasets of a store that have them, what was made from these, and the aliases of it."""

from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vila_ops.artifacts import store
from vila_ops.artifacts.kinds import Dataset
from vila_ops.config import Config
from vila_ops.config.mixture import ALL
from vila_ops.data.shards import INDEX
from vila_ops.lineage.graph import Node, Sealed, read_graph, sealed_of


class RecordHolder(Config):
    """An artifact that holds some of the records, or was made from them."""

    node: Node
    samples: int = 0
    """Samples of the records; 0 for what was made from a dataset that has them."""


def holders(removed: Mapping[str, Sequence[str]], data: Dataset, *, root: str) -> list[RecordHolder]:
    """The datasets that have records of some removals (`Mixture.removed`), then all that was made from these.

    `data` is a dataset with these sources. Another dataset has a source if it reads one of that name, or the same raw
    files under another name.
    """
    digests = store.manifest_of(data)["recipe"]["sources"]
    graph = read_graph(root)
    samples: dict[str, int] = {}
    for one in sealed_of((Dataset,), store=root):
        if count := _count(one, removed, digests):
            samples[one.manifest["digest"]] = count
    made = dict.fromkeys(below for digest in samples for below in graph.below(digest))
    own = [RecordHolder(node=graph.nodes[digest], samples=count) for digest, count in samples.items()]
    return [*own, *(RecordHolder(node=graph.nodes[digest]) for digest in made if digest not in samples)]


def _count(one: Sealed, removed: Mapping[str, Sequence[str]], digests: Mapping[str, str]) -> int:
    """The number of samples of removed records in a dataset."""
    read = one.manifest["recipe"].get("sources", {})
    count = 0
    for source, removals in removed.items():
        names = [name for name, digest in read.items() if name == source or digest == digests.get(source)]
        if names:
            file = store.file(store.reference(Dataset, one.uri, one.manifest), INDEX)
            count += pq.read_table(file, columns=["key"], filters=_rows(names, removals)).num_rows
    return count


def _rows(sources: Sequence[str], removals: Sequence[str]) -> pc.Expression:
    rows = pc.field("source").isin(pa.array(sources, pa.string()))
    if ALL in removals:
        return rows
    told = [removal.partition("=") for removal in removals]
    ids, licences = (
        pa.array([value for key, _, value in told if key == column], pa.string()) for column in ("id", "licence")
    )
    return rows & (pc.field("id").isin(ids) | pc.field("licence").isin(licences))
