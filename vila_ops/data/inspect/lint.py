"""Check a source against its format: every fault of every record, with its file and line."""

import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

from vila_ops.config import Config, Source
from vila_ops.data import sources
from vila_ops.data.containers import BadImage
from vila_ops.data.images import rgb
from vila_ops.data.raw.files import RawFile, Span
from vila_ops.data.records import Dropped, Image, Record


class LintFault(Config):
    """What is wrong in one place."""

    where: str
    """FILE:LINE, as it can be opened from the working directory."""
    reason: str
    """The fixed word by which `prepare` counts it, duplicate_id (which `prepare` keeps), no_record or not_readable."""
    detail: str
    """The value, the rule and the way out."""


class Summary(Config):
    """What a source has, faults among it."""

    records: int
    """That could be read, images that do not decode among them."""
    images: int
    faults: dict[str, int]
    """By reason, the most frequent first."""


def lint(source: Source, folders: Mapping[str, Path] | None = None, *, cache: Path) -> Iterator[LintFault | Summary]:
    """The faults in the order of files and lines, and at the end the summary. Every image is decoded.

    A file that is not of the format at all, or was cut off, is one fault, and nothing after it is read. `folders` are
    those of the source's packages, by name.
    """
    counts: Counter[str] = Counter()
    checks = _Checks(_folder(source))
    with closing(checks):
        try:
            for fault in _faults(source, folders or {}, checks, cache=cache):
                counts[fault.reason] += 1
                yield fault
        except ValueError as error:
            counts["not_readable"] += 1
            yield LintFault(where=_folder(source), reason="not_readable", detail=str(error))
    yield Summary(records=checks.records, images=checks.images, faults=dict(counts.most_common()))


def lines(found: LintFault | Summary) -> str:
    """One line of a fault, and one of each count, for a person."""
    if isinstance(found, LintFault):
        return f"{found.where}  {found.reason}  {' '.join(found.detail.split())}"
    counts = [f"{number:7}  {reason}" for reason, number in found.faults.items()]
    return "\n".join([f"{found.records} records, {found.images} images, {sum(found.faults.values())} faults", *counts])


def _faults(source: Source, folders: Mapping[str, Path], checks: "_Checks", *, cache: Path) -> Iterator[LintFault]:
    for file in sources.raw_files(source, folders, cache=cache):
        mark = file.marks[0] if file.marks else 0
        span = Span(name=file.name, path=file.path, digest=file.digest, start=0, stop=file.count, mark=mark)
        empty = True
        for number, found in enumerate(sources.read(source, folders, span), start=1):
            for record in found:
                empty = False
                if isinstance(record, Dropped):
                    yield checks.fault(record.where or record.id, record.reason, record.detail)
                else:
                    yield from checks.of_record(record, file, number)
        if empty:
            yield checks.fault(file.name, "no_record", "the file holds nothing of this format; take it out")


class _Checks:
    """What is asked of each record that could be read, and of all together."""

    def __init__(self, folder: str) -> None:
        self.records = self.images = 0
        self._folder = folder
        self._places = sqlite3.connect("", isolation_level=None)  # a file of its own where it outgrows memory
        self._places.execute("create table places (id text primary key, place text) without rowid")
        self._places.execute("begin")

    def close(self) -> None:
        """Forget the ids."""
        self._places.close()

    def fault(self, place: str, reason: str, detail: str) -> LintFault:
        """A fault at FILE:LINE, FILE relative to the source."""
        return LintFault(where=f"{self._folder}/{place}" if self._folder else place, reason=reason, detail=detail)

    def of_record(self, record: Record, file: RawFile, number: int) -> Iterator[LintFault]:
        """Its id, and its images; the record is the file's `number`th."""
        self.records += 1
        stated = record.provenance.split(" ", 1)[0]
        place = stated if stated.startswith(file.name) else f"{file.name}:{number}"
        if self._places.execute("insert or ignore into places values (?, ?)", (record.id, place)).rowcount == 0:
            ((first,),) = self._places.execute("select place from places where id = ?", (record.id,))
            yield self.fault(place, "duplicate_id", f"the id {record.id!r} is that of {first} too; give it another")
        images = (part for turn in record.turns for part in turn.parts if isinstance(part, Image))
        for position, image in enumerate(images, start=1):
            self.images += 1
            try:
                rgb(image.data, at_least=1)
            except BadImage as error:
                yield self.fault(place, f"bad_image_{error.reason}", f"image {position}: {error}")


def _folder(source: Source) -> str:
    """The folder that the names of a source's files are relative to; empty for packages."""
    stated = getattr(source, "path", None)
    if stated is None:
        return ""
    path = Path(stated)
    return str(path.parent if path.is_file() else path)
