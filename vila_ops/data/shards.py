"""The files of a prepared mixture: tar shards of samples, and one Parquet index over them.

A shard is a plain WebDataset tar: `KEY.json` with the tokens, `KEY.0.webp`, `KEY.1.webp`, ... with the images.
The index has one row a sample, so that any sample is one seek away.
"""

import base64
import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vila_ops.artifacts import store
from vila_ops.artifacts.kinds import Dataset
from vila_ops.data.records import Dropped
from vila_ops.errors import CorruptArtifact

SHARD = "shard.tar"
INDEX = "index.parquet"
DROPPED = "dropped.parquet"
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("id", pa.string()),
        ("source", pa.string()),
        ("split", pa.string()),
        ("object", pa.string()),
        ("licence", pa.string()),
        ("shard", pa.string()),
        ("offset", pa.int64()),
        ("num_tokens", pa.int32()),
        ("num_targets", pa.int32()),
        ("num_images", pa.int32()),
    ]
)
DROPPED_SCHEMA = pa.schema([(name, pa.string()) for name in ("source", "id", "reason", "where", "detail")])


class CorruptShard(CorruptArtifact):
    """A shard does not hold what its index says."""


@dataclass(frozen=True)
class Sample:
    """One tokenised sample with its images, and what it was made from."""

    id: str
    """Of its record."""
    source: str
    object: str
    category: str
    text: str
    """The record's text parts, joined: what a benchmark asks about; of a piece of a long document its own words."""
    licence: str
    provenance: str
    input_ids: list[int]
    is_target: list[bool]
    images: tuple[bytes, ...]
    """Encoded squares, in the order of their placeholders."""
    key: str = ""
    """Unique in the dataset; given by the writer."""


class ShardWriter:
    """Writes one shard; the same samples give the same bytes."""

    def __init__(self, path: Path, *, name: str, suffix: str) -> None:
        """name: of the shard in a dataset, SOURCE-STEM.tar; the samples' keys are STEM-NUMBER."""
        self.name, self.suffix = name, suffix
        self._stem = name.removesuffix(".tar").rpartition("-")[2]
        self.rows: list[dict[str, Any]] = []
        self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 closed by close()

    def add(self, sample: Sample, *, split: str) -> None:
        """Append one sample."""
        key = f"{self._stem}-{len(self.rows):06d}"
        offset = self._tar.offset
        head = {**vars(sample), "key": key}  # asdict would copy every token, for 0.6 ms
        for field in ("images", "is_target"):
            del head[field]
        names = [f"{key}.{index}.{self.suffix}" for index in range(len(sample.images))]
        head["images"] = names
        head["targets"] = runs(sample.is_target)
        self._member(f"{key}.json", json.dumps(head, sort_keys=True, ensure_ascii=False).encode())
        for name, data in zip(names, sample.images, strict=True):
            self._member(name, data)
        self.rows.append(
            {
                "key": key,
                "id": sample.id,
                "source": sample.source,
                "split": split,
                "object": sample.object,
                "licence": sample.licence,
                "shard": self.name,
                "offset": offset,
                "num_tokens": len(sample.input_ids),
                "num_targets": sum(sample.is_target[1:]),  # nothing predicts a first token
                "num_images": len(sample.images),
            }
        )

    def close(self) -> list[dict[str, Any]]:
        """Finish the file; returns the index rows."""
        self._tar.close()
        return self.rows

    def _member(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)  # owner, mode and time stay at their constants
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))


def write_index(rows: list[dict[str, Any]], folder: Path) -> None:
    """Write the index of a shard."""
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), folder / INDEX, compression="zstd")


def write_dropped(dropped: Sequence[Dropped], source: str, folder: Path) -> None:
    """Write down every record that did not become a sample: which, why, and where it is found."""
    rows = [{"source": source, **asdict(one)} for one in dropped]
    pq.write_table(pa.Table.from_pylist(rows, schema=DROPPED_SCHEMA), folder / DROPPED, compression="zstd")


def read_index(folder: Path) -> pa.Table:
    """The index of a prepared mixture, one row a sample."""
    return pq.read_table(folder / INDEX, schema=SCHEMA)


def find_rows(dataset: Dataset, keys: Sequence[str]) -> list[dict[str, Any]]:
    """Key, source and record id of samples by their keys, in no order; a key that is not there is left out."""
    wanted = pc.field("key").isin(pa.array(keys, pa.string()))
    columns = ["key", "source", "id"]
    rows: list[dict[str, Any]] = pq.read_table(store.file(dataset, INDEX), columns=columns, filters=wanted).to_pylist()
    return rows


def read_sample(folder: Path, *, shard: str, offset: int, key: str) -> Sample:
    """One sample by its place; raises CorruptShard when something else stands there."""
    try:
        with (folder / shard).open("rb") as file:
            file.seek(offset)
            head = json.loads(_next_member(file, f"{key}.json"))
            images = [_next_member(file, name) for name in head.pop("images")]
        targets = head.pop("targets")
        return Sample(**head, is_target=mask(targets, len(head["input_ids"])), images=tuple(images))
    except (tarfile.TarError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptShard(
            f"{folder / shard} at byte {offset} does not hold sample {key!r} ({error}); "
            f"verify the dataset, move its folder away and prepare it again"
        ) from error


def index_of(dataset: Dataset) -> pa.Table:
    """The index of a sealed dataset, one row a sample; from S3 nothing else comes here."""
    return read_index(store.file(dataset, INDEX).parent)


def samples_of(dataset: Dataset, rows: Iterable[Mapping[str, Any]]) -> Iterator[Sample]:
    """The samples of some rows of a sealed dataset's index; from S3 only their shards come here."""
    files = store.opened(dataset)
    shards: dict[str, Path] = {}
    for row in rows:
        name = row["shard"]
        if name not in shards:
            shards[name] = files.file(name)
        yield read_sample(shards[name].parent, shard=shards[name].name, offset=row["offset"], key=row["key"])


def data_url(image: bytes) -> str:
    """An encoded square of a sample, JPEG or WebP, as a data: URL."""
    kind = "jpeg" if image.startswith(b"\xff\xd8") else "webp"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def runs(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """The (start, stop) runs of True."""
    marks = bytes(flags) + b"\0"
    found: list[tuple[int, int]] = []
    start = marks.find(1)
    while start >= 0:
        stop = marks.find(0, start)
        found.append((start, stop))
        start = marks.find(1, stop)
    return found


def mask(spans: Sequence[tuple[int, int]], length: int) -> list[bool]:
    """The flags that `runs` came from."""
    flags = [False] * length
    for start, stop in spans:
        flags[start:stop] = [True] * (stop - start)
    return flags


def _next_member(file: BinaryIO, name: str) -> bytes:
    """The tar member that starts where the file stands, which must have this name."""
    info = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "strict")
    if info.name != name:
        raise ValueError(f"found member {info.name!r} instead of {name!r}")
    data = file.read(info.size)
    if len(data) != info.size:
        raise ValueError("the file ends early")
    file.seek(-info.size % tarfile.BLOCKSIZE, io.SEEK_CUR)
    return data
