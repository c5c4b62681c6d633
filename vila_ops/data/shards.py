"""The files of a prepared mixture: tar shards of samples, and one Parquet index over them.

A shard is a plain WebDataset tar: `KEY.json` with the tokens, `KEY.0.webp`, `KEY.1.webp`, ... with the images.
The index has one row for each sample with its offset, so that any sample is read with one seek.
"""

import base64
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
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
    """A shard does not contain what its index states."""


@dataclass(frozen=True)
class Sample:
    """One tokenised sample with its images and the provenance of its record."""

    id: str
    """Id of its record."""
    source: str
    object: str
    category: str
    text: str
    """The record's text parts, joined; for a piece of a split document, the text of that piece. Benchmarks read it."""
    licence: str
    provenance: str
    input_ids: list[int]
    is_target: list[bool]
    images: tuple[bytes, ...]
    """Encoded squares, in the order of their placeholders."""
    key: str = ""
    """Unique in the dataset; set by ShardWriter."""


class ShardWriter:
    """Writes one shard; the same samples give the same bytes."""

    def __init__(self, path: Path, *, name: str, suffix: str) -> None:
        """`name` is the shard's name in a dataset, SOURCE-STEM.tar; the samples' keys are STEM-NUMBER."""
        self.name, self.suffix = name, suffix
        self._stem = name.removesuffix(".tar").rpartition("-")[2]
        self.rows: list[dict[str, Any]] = []
        self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 closed by close()

    def add(self, sample: Sample, *, split: str) -> None:
        """Append one sample."""
        key = f"{self._stem}-{len(self.rows):06d}"
        offset = self._tar.offset
        head = {**vars(sample), "key": key}  # asdict would copy every token, which takes 0.6 ms
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
                "num_targets": sum(sample.is_target[1:]),  # the first token is never predicted
                "num_images": len(sample.images),
            }
        )

    def close(self) -> list[dict[str, Any]]:
        """Finish the file; returns the index rows."""
        self._tar.close()
        return self.rows

    def _member(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)  # owner, mode and time keep their constant defaults
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))


def write_index(rows: list[dict[str, Any]], folder: Path) -> None:
    """Write the index of a shard."""
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), folder / INDEX, compression="zstd")


def write_dropped(dropped: Sequence[Dropped], source: str, folder: Path) -> None:
    """Write the list of records that did not become samples: id, reason, place and detail."""
    rows = [{"source": source, **asdict(one)} for one in dropped]
    pq.write_table(pa.Table.from_pylist(rows, schema=DROPPED_SCHEMA), folder / DROPPED, compression="zstd")


def read_index(folder: Path) -> pa.Table:
    """The index of a prepared mixture, one row for each sample."""
    return pq.read_table(folder / INDEX, schema=SCHEMA)


def find_rows(dataset: Dataset, keys: Sequence[str]) -> list[dict[str, Any]]:
    """Key, source and record id of the samples with these keys, in any order; unknown keys are omitted."""
    wanted = pc.field("key").isin(pa.array(keys, pa.string()))
    columns = ["key", "source", "id"]
    rows: list[dict[str, Any]] = pq.read_table(store.file(dataset, INDEX), columns=columns, filters=wanted).to_pylist()
    return rows


def read_sample(folder: Path, *, shard: str, offset: int, key: str) -> Sample:
    """One sample by its location. Raises CorruptShard if the location holds something else."""
    try:
        with (folder / shard).open("rb") as file:
            file.seek(offset)
            head = json.loads(_next_member(file, f"{key}.json"))
            images = [_next_member(file, name) for name in head.pop("images")]
        targets = head.pop("targets")
        return Sample(**head, is_target=mask(targets, len(head["input_ids"])), images=tuple(images))
    except FileNotFoundError as error:
        raise CorruptShard(f"{folder / shard} is gone; something removed it while it was read: run again") from error
    except (tarfile.TarError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptShard(
            f"{folder / shard} at byte {offset} does not hold sample {key!r} ({error}), so it has changed since it was "
            f"verified; run again: all of it is compared with its sha256, and the message says what to move away"
        ) from error


def index_of(dataset: Dataset) -> pa.Table:
    """The index of a sealed dataset, one row for each sample; from S3 only the index is fetched."""
    return read_index(store.file(dataset, INDEX).parent)


def named(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Index rows with the `name` of each sample: SOURCE/RECORD, and #2, #3, ... for further samples of the record.

    Keys depend on the text format, names do not where a record becomes as many samples.
    """
    times: Counter[str] = Counter()
    listed = []
    for row in sorted(rows, key=itemgetter("key")):
        record = f"{row['source']}/{row['id']}"
        times[record] += 1
        listed.append({**row, "name": record if times[record] == 1 else f"{record}#{times[record]}"})
    return listed


def samples_of(dataset: Dataset, rows: Iterable[Mapping[str, Any]]) -> Iterator[Sample]:
    """The samples of some rows of a sealed dataset's index; from S3 only their shards are fetched."""
    files = store.opened(dataset)
    shards: dict[str, Path] = {}
    for row in rows:
        name = row["shard"]
        if name not in shards:
            shards[name] = files.file(name)
        yield read_sample(shards[name].parent, shard=shards[name].name, offset=row["offset"], key=row["key"])


def data_url(image: bytes) -> str:
    """An encoded image, JPEG, PNG or WebP, as a data: URL."""
    kind = {b"\xff\xd8": "jpeg", b"\x89P": "png"}.get(image[:2], "webp")
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def runs(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """The (start, stop) runs of True."""
    marks = bytes(flags) + b"\0"
    spans: list[tuple[int, int]] = []
    start = marks.find(1)
    while start >= 0:
        stop = marks.find(0, start)
        spans.append((start, stop))
        start = marks.find(1, stop)
    return spans


def mask(spans: Sequence[tuple[int, int]], length: int) -> list[bool]:
    """The inverse of `runs`: flags of the given length that are True in the spans."""
    flags = [False] * length
    for start, stop in spans:
        flags[start:stop] = [True] * (stop - start)
    return flags


def _next_member(file: BinaryIO, name: str) -> bytes:
    """The content of the tar member at the file's position. Raises ValueError if it has another name."""
    info = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "strict")
    if info.name != name:
        raise ValueError(f"found member {info.name!r} instead of {name!r}")
    data = file.read(info.size)
    if len(data) != info.size:
        raise ValueError("the file ends early")
    file.seek(-info.size % tarfile.BLOCKSIZE, io.SEEK_CUR)
    return data
