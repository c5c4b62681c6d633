"""The images fetched so far, consistent after a kill at any moment.

    NAME.bodies.partial   the images in the order of their arrival
    NAME.journal.jsonl    one line for each URL, written after its image is on the disk

When a journal is opened again, an incomplete last line and the bytes after the last recorded image are truncated.
"""

import asyncio
import fcntl
import hashlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from vila_ops.data.download.outcome import DownloadRecord

BEGINS = b'{"url": '
"""The start of every line of a journal."""


def journal_path(out: Path) -> Path:
    """The path of a raw file's journal; `out` is the path without suffixes."""
    return out.with_name(f"{out.name}.journal.jsonl")


def bodies_path(out: Path) -> Path:
    """The path of its images."""
    return out.with_name(f"{out.name}.bodies.partial")


def is_journal(out: Path) -> bool:
    """Whether the file was written by a `Journal`; it may be empty or have an incomplete first line."""
    if not journal_path(out).is_file():
        return False
    with journal_path(out).open("rb") as file:
        return BEGINS.startswith(file.read(len(BEGINS)))


def records_of(out: Path) -> dict[str, DownloadRecord]:
    """The records of a journal by URL, read without opening it for writing; empty without a journal."""
    if not journal_path(out).is_file():
        return {}
    with journal_path(out).open("rb") as file:
        return {record.url: record for _, record, _ in _whole_lines(file)}


class Journal:
    """The records of one raw file, by URL. One process at a time."""

    def __init__(self, out: Path) -> None:
        """Open or create a journal; `out` is the path without suffixes. Raises ValueError if another process has it."""
        self._bodies_path = bodies_path(out)
        self._lines_path = journal_path(out)
        self.records: dict[str, DownloadRecord] = {}
        self._offsets: dict[str, int] = {}
        self._waiting: list[tuple[DownloadRecord, bytes]] = []
        self._writing = asyncio.Lock()
        self._lines = self._lines_path.open("ab+")
        try:
            fcntl.flock(self._lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lines.close()
            raise ValueError(f"{self._lines_path}: another process downloads into it; wait for that one") from error
        self._bodies = self._bodies_path.open("ab+")
        self._recover()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bodies.close()
        self._lines.close()

    async def add(self, record: DownloadRecord, body: bytes) -> None:
        """Return when the record is on the disk. Records that wait at the same time are written together."""
        self._waiting.append((record, body))
        async with self._writing:
            batch, self._waiting = self._waiting, []
            if batch:
                await asyncio.to_thread(self.write, batch)

    def write(self, batch: list[tuple[DownloadRecord, bytes]]) -> None:
        """Write records to the disk: first the images, then their lines."""
        lines = []
        self._bodies.seek(0, os.SEEK_END)
        for record, body in batch:
            self._offsets[record.url] = self._bodies.tell()
            self._bodies.write(body)
            lines.append(json.dumps({**asdict(record), "offset": self._offsets[record.url]}) + "\n")
        _sync(self._bodies)
        self._lines.write("".join(lines).encode())
        _sync(self._lines)
        self.records.update((record.url, record) for record, _ in batch)

    def body(self, url: str) -> bytes:
        """An image. Raises ValueError if it differs from what was written."""
        record = self.records[url]
        self._bodies.seek(self._offsets[url])
        data = self._bodies.read(record.bytes or 0)
        if hashlib.sha256(data).hexdigest() != record.sha256:
            raise ValueError(
                f"{self._bodies_path}: the image of {url} has changed on the disk; "
                f"remove this file and {self._lines_path.name}, and download again"
            )
        return data

    def clear(self) -> None:
        """Delete all records."""
        self.records, self._offsets = {}, {}
        self._lines.truncate(0)
        self._bodies.truncate(0)

    def remove(self) -> None:
        """Delete both files, once their content is in the tar and the manifest."""
        self._lines_path.unlink(missing_ok=True)
        self._bodies_path.unlink(missing_ok=True)

    def _recover(self) -> None:
        size = os.fstat(self._bodies.fileno()).st_size
        lines_end = bodies_end = 0
        self._lines.seek(0)
        for length, record, offset in _whole_lines(self._lines):
            end = offset + (record.bytes or 0)
            if end > size:
                break
            self.records[record.url], self._offsets[record.url] = record, offset
            lines_end, bodies_end = lines_end + length, max(bodies_end, end)
        self._lines.truncate(lines_end)
        self._bodies.truncate(bodies_end)


def _whole_lines(file: BinaryIO) -> Iterator[tuple[int, DownloadRecord, int]]:
    """(length of the line in bytes, record, offset of its image) up to the first incomplete line."""
    for line in file:
        if not line.endswith(b"\n"):
            return
        try:
            fields = json.loads(line)
            offset = int(fields.pop("offset"))
            yield len(line), DownloadRecord(**fields), offset
        except (ValueError, KeyError, TypeError, AttributeError):
            return  # damaged by a power cut; the lines after it are not valid either


def _sync(file: io.BufferedRandom) -> None:
    file.flush()
    os.fsync(file.fileno())
