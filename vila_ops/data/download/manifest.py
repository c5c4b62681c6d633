"""The results for one raw file: a tar of its images, and a table with the outcome of every URL.

    NAME.tar       a WebDataset tar: KEY.jpg, KEY.png, ... with the bytes as they were sent
    NAME.parquet   one row for each distinct URL, in the order of first appearance; written last, so it marks the end

The same responses give the same bytes, whatever their order in time.
"""

import hashlib
import os
import tarfile
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vila_ops.data.download.journal import Journal, bodies_path, is_journal, journal_path
from vila_ops.data.download.outcome import DownloadRecord, Outcome
from vila_ops.data.raw.objects import ObjectPath, for_arrow
from vila_ops.errors import VilaError

SCHEMA = pa.schema(
    [
        ("url", pa.string()),
        ("key", pa.string()),  # the member's name without its extension
        ("outcome", pa.string()),
        ("detail", pa.string()),
        ("http_status", pa.int16()),
        ("attempts", pa.int16()),
        ("final_url", pa.string()),
        ("extension", pa.string()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
        ("offset", pa.int64()),  # of the member's header in the tar
    ]
)
TAR_BYTES = b"tar_bytes"
REOPEN_ROWS = 64
"""Rows whose images are in memory together."""


@dataclass(frozen=True)
class Outcomes:
    """The outcomes of the URLs of one raw file."""

    name: str
    counts: dict[Outcome, int]
    """Number of distinct URLs by outcome."""
    bytes: int
    """Size of all images."""


def table(finished: Sequence[Outcomes]) -> list[str]:
    """Lines with the number of URLs of all raw files by outcome, the most frequent first, and their sum."""
    counts = sum((Counter(one.counts) for one in finished), Counter[str]())
    whole = sum(counts.values())
    rows = [f"{outcome:17} {count:11,} {count / whole:7.2%}" for outcome, count in counts.most_common()]
    size = sum(one.bytes for one in finished) / 1e6
    return [*rows, f"{'all':17} {whole:11,}         of {len(finished)} raw files, {size:,.1f} MB of images"]


def key_of(url: str) -> str:
    """The name of a URL's image in the tar, without the extension."""
    return hashlib.sha256(url.encode()).hexdigest()[:24]


def manifest_path(out: Path) -> Path:
    """The path of a raw file's table; `out` is the path without suffixes."""
    return out.with_name(f"{out.name}.parquet")


def tar_path(out: Path) -> Path:
    """The path of its images."""
    return out.with_name(f"{out.name}.tar")


def check_ours(out: Path) -> None:
    """Raise ValueError if a file that would be written exists and no download wrote it.

    A table is recognised by its metadata, a journal by its first line, a tar or draft by a table or journal beside it.
    """
    tables = [manifest_path(out)] if manifest_path(out).exists() else []
    journals = [journal_path(out)] if journal_path(out).exists() else []
    foreign = [path for path in tables if not _is_table(path)] + [path for path in journals if not is_journal(out)]
    if not tables and not journals:
        others = (tar_path(out), _draft(tar_path(out)), _draft(manifest_path(out)), bodies_path(out))
        foreign = [path for path in others if path.exists()]
    if foreign:
        raise ValueError(
            f"{foreign[0]} exists and no download wrote it; it would be overwritten: choose another folder, or "
            f"move it away"
        )


def write_manifest(journal: Journal, urls: Sequence[str], out: Path) -> None:
    """Write tar and table of distinct URLs, all of which have a record in the journal."""
    rows = []
    temporary = _draft(tar_path(out))
    with temporary.open("wb") as tar:
        for url in urls:
            record = journal.records[url]
            row = {**asdict(record), "key": key_of(url), "offset": None}
            if record.outcome == "ok":
                row["offset"] = tar.tell()
                _add_member(tar, f"{key_of(url)}.{record.extension}", journal.body(url))
            rows.append(row)
        tar.write(bytes(2 * tarfile.BLOCKSIZE))
        tar_bytes = tar.tell()
    _publish(temporary, tar_path(out))
    temporary = _draft(manifest_path(out))
    schema = SCHEMA.with_metadata({TAR_BYTES: str(tar_bytes)})
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), temporary, compression="zstd")
    _publish(temporary, manifest_path(out))


def upload(work: Path, out: ObjectPath) -> None:
    """Move tar and table to an object store; the table last, since it marks the end."""
    for path_of in (tar_path, manifest_path):
        target = path_of(out)
        assert isinstance(target, ObjectPath)
        target.write(path_of(work))
    for path_of in (manifest_path, tar_path):
        path_of(work).unlink()


def unfinished(urls: Sequence[str], out: Path, *, retry: Collection[Outcome]) -> bool:
    """Whether URLs are missing in the manifest, as after the raw file grew, or ended in one of the `retry` outcomes."""
    rows = finished_rows(out)
    return any(url not in rows or rows[url][0] in retry for url in urls)


def finished_rows(out: Path) -> dict[str, tuple[Outcome, int | None]]:
    """Outcome and bytes of each URL of a finished raw file. Raises ValueError if tar and table do not match."""
    rows = _rows(out)
    columns = (rows[name].to_pylist() for name in ("url", "outcome", "bytes"))
    return {url: (outcome, size) for url, outcome, size in zip(*columns, strict=True)}


def read_outcomes(urls: Sequence[str], out: Path) -> Outcomes:
    """The outcomes of these URLs of a finished raw file. Raises ValueError if tar and table do not match."""
    rows = _rows(out)
    own = rows.filter(pc.field("url").isin(pa.array(urls, pa.string())))
    counts = Counter(own["outcome"].to_pylist())
    return Outcomes(out.name, dict(sorted(counts.items())), sum(filter(None, own["bytes"].to_pylist())))


def _rows(out: Path) -> pa.Table:
    """URL, outcome and bytes of a finished raw file. Raises ValueError if tar and table do not match."""
    table = pq.read_table(for_arrow(manifest_path(out)), columns=["url", "outcome", "bytes"])
    tar_bytes = int(table.schema.metadata[TAR_BYTES])
    if not tar_path(out).is_file() or tar_path(out).stat().st_size != tar_bytes:
        raise ValueError(
            f"{tar_path(out)} is missing or not of the {tar_bytes} bytes that {manifest_path(out).name} "
            f"says; move both away and download again"
        )
    return table


def reopen(journal: Journal, out: Path, *, retry: Collection[Outcome]) -> None:
    """Reopen a finished raw file, without the URLs that ended in one of the `retry` outcomes."""
    journal.clear()  # left by a kill before its removal or in this function; the manifest has all of it
    again = pc.field("outcome").isin(pa.array(list(retry), pa.string()))
    kept = pq.read_table(for_arrow(manifest_path(out))).filter(~again)
    with tar_path(out).open("rb") as tar:
        for some in kept.to_batches(max_chunksize=REOPEN_ROWS):
            batch = []
            for row in some.to_pylist():
                record = DownloadRecord(**{field.name: row[field.name] for field in fields(DownloadRecord)})
                tar.seek((row["offset"] or 0) + tarfile.BLOCKSIZE)
                batch.append((record, tar.read(record.bytes or 0)))
            journal.write(batch)
    manifest_path(out).unlink()


def _add_member(tar: BinaryIO, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # owner, mode and time keep their constant defaults
    info.size = len(data)
    tar.write(info.tobuf(tarfile.USTAR_FORMAT))
    tar.write(data)
    tar.write(bytes(-len(data) % tarfile.BLOCKSIZE))


def _is_table(path: Path) -> bool:
    try:
        return TAR_BYTES in (pq.read_schema(for_arrow(path)).metadata or {})
    except VilaError:  # of the store, not of the file
        raise
    except (pa.ArrowInvalid, OSError):
        return False


def _draft(final: Path) -> Path:
    return final.with_name(f"{final.name}.partial")


def _publish(temporary: Path, final: Path) -> None:
    """Rename a file atomically and durably."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(final)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
