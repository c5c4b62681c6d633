"""The index of a prepared mixture as memory-mapped columns: a sample is a number in it.

The Parquet index is converted to arrays once for each dataset and machine, batch by batch; N samples, S bytes of keys.

num_tokens, num_targets, num_images (N,)   of each sample
shard (N,), offset (N,)                    location of each sample: number of its shard, byte offset
key_end (N,), keys (S,)                    its key is keys[key_end[i - 1] : key_end[i]], UTF-8
numbers (N,)                               the samples grouped by split and source
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vila_ops.data.loading.arrays import Arrays, new_array
from vila_ops.data.shards import INDEX

LAYOUT = 2
"""Raised if the arrays change."""
BATCH = 2**17
"""Rows of the Parquet file in memory at once."""
COLUMNS = {"num_tokens": np.int32, "num_targets": np.int32, "num_images": np.int32, "offset": np.int64}
"""Columns that become arrays unchanged."""


class SampleLocation(NamedTuple):
    """The location of a sample."""

    key: str
    shard: str
    offset: int


class IndexGroup(NamedTuple):
    """The samples of one source in one split, as numbers[start : start + samples]."""

    split: str
    source: str
    start: int
    samples: int
    tokens: int


class Index:
    """The index of one dataset."""

    def __init__(self, file: Callable[[str], Path], *, digest: str, cache: Path) -> None:
        """`file` returns the path of a file of the dataset with this digest by name; `cache` keeps the arrays."""
        self._arrays = Arrays(cache / f"index-{digest[:32]}-{LAYOUT}", lambda folder: _write(file(INDEX), folder))
        self.groups = [IndexGroup(*group) for group in self._arrays.facts["groups"]]
        self._shards: list[str] = self._arrays.facts["shards"]

    def numbers(self, group: IndexGroup) -> NDArray[np.uint32]:
        """The samples of a group."""
        return self._arrays.read("numbers", group.start, group.start + group.samples)

    def num_tokens(self) -> NDArray[np.int32]:
        """The number of tokens of every sample."""
        return self._arrays.read("num_tokens")

    def num_targets(self, numbers: NDArray[np.integer]) -> NDArray[np.int32]:
        """The number of target tokens of each of these samples."""
        return self._arrays.take("num_targets", numbers)

    def num_images(self, numbers: NDArray[np.integer]) -> NDArray[np.int32]:
        """The number of images of each of these samples."""
        return self._arrays.take("num_images", numbers)

    def location(self, number: int) -> SampleLocation:
        """The location of a sample."""
        one = {name: int(self._arrays.read(name, number, number + 1)[0]) for name in ("shard", "offset", "key_end")}
        start = int(self._arrays.read("key_end", number - 1, number)[0]) if number else 0
        key = self._arrays.read("keys", start, one["key_end"]).tobytes().decode()
        return SampleLocation(key, self._shards[one["shard"]], one["offset"])


def _write(path: Path, folder: Path) -> dict[str, Any]:
    """Convert a Parquet index to arrays in `folder`; returns its groups and the names of its shards."""
    file = pq.ParquetFile(path)
    total = file.metadata.num_rows
    shapes = {**COLUMNS, "shard": np.uint32, "key_end": np.int64, "numbers": np.uint32}
    arrays = {name: new_array(folder / f"{name}.npy", dtype, total) for name, dtype in shapes.items()}
    shards: dict[str, int] = {}
    kinds: dict[str, int] = {}  # SPLIT/SOURCE
    kind = np.empty(total, np.uint16)
    start = 0
    for batch in file.iter_batches(BATCH, columns=[*COLUMNS, "shard", "key", "split", "source"]):
        part = slice(start, start + len(batch))
        for name in COLUMNS:
            arrays[name][part] = batch[name]
        arrays["shard"][part] = _codes(batch["shard"], shards)
        arrays["key_end"][part] = pc.binary_length(batch["key"])
        kind[part] = _codes(pc.binary_join_element_wise(batch["split"], batch["source"], "/"), kinds)
        start = part.stop
    np.cumsum(arrays["key_end"], out=arrays["key_end"])
    _write_keys(file, folder, size=int(arrays["key_end"][-1]) if total else 0)
    groups = []
    start = 0
    for name, code in sorted(kinds.items()):
        numbers = np.flatnonzero(kind == code)
        arrays["numbers"][start : start + len(numbers)] = numbers
        tokens = int(arrays["num_tokens"][numbers].sum(dtype=np.int64))
        split, _, source = name.partition("/")
        groups.append(IndexGroup(split, source, start, len(numbers), tokens))
        start += len(numbers)
    return {"groups": groups, "shards": list(shards)}


def _write_keys(file: pq.ParquetFile, folder: Path, *, size: int) -> None:
    keys = new_array(folder / "keys.npy", np.uint8, size)
    start = 0
    for batch in file.iter_batches(BATCH, columns=["key"]):
        column = batch["key"]
        _, ends, text = column.buffers()
        first, last = np.frombuffer(ends, np.int32)[[column.offset, column.offset + len(column)]].tolist()
        if first < last:
            keys[start : start + last - first] = np.frombuffer(text, np.uint8)[first:last]
        start += last - first


def _codes(column: pa.Array, known: dict[str, int]) -> NDArray[np.integer]:
    """A number for each value, consistent over batches; new values are added to `known`."""
    encoded = column.dictionary_encode()
    codes = [known.setdefault(value, len(known)) for value in encoded.dictionary.to_pylist()]
    numbers: NDArray[np.integer] = np.asarray(codes, np.uint32)[encoded.indices.to_numpy()]
    return numbers
