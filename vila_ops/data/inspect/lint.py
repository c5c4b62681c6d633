"""Check a source against its format: every fault of every record, with its file and line."""

import operator
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

from pydantic import Field

from vila_ops.config import Config, Source
from vila_ops.data import sources
from vila_ops.data.containers import BadImage
from vila_ops.data.images import rgb
from vila_ops.data.raw.files import RawFile, Span
from vila_ops.data.raw.objects import raw_path
from vila_ops.data.records import CHANGES, Dropped, Image, Record
from vila_ops.errors import counted


class LintFault(Config):
    """A fault at one place of the raw files."""

    where: str
    """FILE:LINE, with FILE relative to the working directory."""
    reason: str
    """The reason by which `prepare` counts it, or duplicate_id (accepted by `prepare`), no_record or not_readable."""
    detail: str
    """The value, the rule and the way out."""


class LintSummary(Config):
    """The counts of a source."""

    records: int
    """Those that cannot be read too, as `prepare` counts them."""
    images: int
    """Images of the records that can be read."""
    faults: dict[str, int]
    """By reason, the most frequent first."""
    changed: dict[str, int] = Field(default={}, exclude_if=operator.not_)
    """Records that differ from their raw form, by the reason (`records.CHANGES`)."""


def lint(
    source: Source, folders: Mapping[str, Path] | None = None, *, cache: Path
) -> Iterator[LintFault | LintSummary]:
    """The faults in the order of files and lines, and then the summary. Every image is decoded.

    A file that is not of the format, or is cut off, is one fault, and nothing after it is read. `folders` are the
    folders of the source's packages, by name.
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
    yield LintSummary(
        records=checks.records,
        images=checks.images,
        faults=dict(counts.most_common()),
        changed=dict(checks.changed.most_common()),
    )


def lines(result: LintFault | LintSummary) -> str:
    """A fault as one line, or a summary with a line for each count."""
    if isinstance(result, LintFault):
        return f"{result.where}  {result.reason}  {' '.join(result.detail.split())}"
    counts = [f"{number:7}  {reason}" for reason, number in result.faults.items()]
    counts += [f"{number:7}  {reason} (kept): {CHANGES[reason]}" for reason, number in result.changed.items()]
    totals = ((result.records, "record"), (result.images, "image"), (sum(result.faults.values()), "fault"))
    return "\n".join([", ".join(counted(number, noun) for number, noun in totals), *counts])


def _faults(source: Source, folders: Mapping[str, Path], checks: "_Checks", *, cache: Path) -> Iterator[LintFault]:
    sources.check_images(source)
    for file in sources.raw_files(source, folders, cache=cache):
        mark = file.marks[0] if file.marks else 0
        span = Span(name=file.name, path=file.path, digest=file.digest, start=0, stop=file.count, mark=mark)
        empty = True
        for number, records in enumerate(sources.read(source, folders, span), start=1):
            for record in records:
                empty = False
                checks.records += 1
                if isinstance(record, Dropped):
                    yield checks.fault(record.where or record.id, record.reason, record.detail)
                else:
                    yield from checks.of_record(record, file, number)
        if empty:
            yield checks.fault(file.name, "no_record", "the file has no records; remove it")


class _Checks:
    """Checks of each readable record, and of all records together."""

    def __init__(self, folder: str) -> None:
        self.records = self.images = 0
        self.changed: Counter[str] = Counter()
        self._folder = folder
        self._places = sqlite3.connect("", isolation_level=None)  # a temporary file if it outgrows memory
        self._places.execute("create table places (id text primary key, place text) without rowid")
        self._places.execute("begin")

    def close(self) -> None:
        """Close the temporary table of ids."""
        self._places.close()

    def fault(self, place: str, reason: str, detail: str) -> LintFault:
        """A fault at FILE:LINE, FILE relative to the source."""
        return LintFault(where=f"{self._folder}/{place}" if self._folder else place, reason=reason, detail=detail)

    def of_record(self, record: Record, file: RawFile, number: int) -> Iterator[LintFault]:
        """Faults of the id and the images of the `number`th record of a file."""
        self.changed.update(record.notes)
        stated = record.provenance.split(" ", 1)[0]
        place = stated if stated.startswith(file.name) else f"{file.name}:{number}"
        if self._places.execute("insert or ignore into places values (?, ?)", (record.id, place)).rowcount == 0:
            ((first,),) = self._places.execute("select place from places where id = ?", (record.id,))
            yield self.fault(place, "duplicate_id", f"the id {record.id!r} is also that of {first}; change one of them")
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
    path = raw_path(stated)
    return str(path.parent if path.is_file() else path)
