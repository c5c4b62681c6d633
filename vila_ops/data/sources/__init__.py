"""The kinds of sources: one table, kind -> module; a module is imported when a source of its kind is read."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Protocol, cast

from vila_ops.config import Source, fingerprint
from vila_ops.config.kinds import Group, module_of
from vila_ops.data.raw.files import Folders, RawFile, Span
from vila_ops.data.raw.known import NOTHING, Known
from vila_ops.data.raw.objects import raw_path
from vila_ops.data.records import Dropped, Record
from vila_ops.data.sources.packaged import packages_digest

GROUP: Group = "vila_ops.sources"
"""Entry points of this group add kinds."""
SOURCES: Mapping[str, str] = {
    "tux_paint": "vila_ops.data.sources.tux_paint",
    "fluent_emoji": "vila_ops.data.sources.fluent_emoji",
    "emoji_datasource": "vila_ops.data.sources.emoji_datasource",
    "gimp_help": "vila_ops.data.sources.gimp_help",
    "gcompris": "vila_ops.data.sources.gcompris",
    "wordnet": "vila_ops.data.sources.wordnet",
    "gnome_help": "vila_ops.data.sources.gnome_help",
    "jsonl": "vila_ops.data.sources.jsonl",
    "llava": "vila_ops.data.sources.llava",
    "llava_cc3m": "vila_ops.data.sources.llava_cc3m",
    "mmc4": "vila_ops.data.sources.mmc4",
    "coyo": "vila_ops.data.sources.coyo",
    "interleaved": "vila_ops.data.sources.interleaved",
    "flan": "vila_ops.data.sources.flan",
    "vflan": "vila_ops.data.sources.vflan",
    "messages": "vila_ops.data.sources.messages",
    "webdataset": "vila_ops.data.sources.webdataset",
    "hf_parquet": "vila_ops.data.sources.hf_parquet",
    "html": "vila_ops.data.sources.html",
    "table": "vila_ops.data.sources.table",
}


class SourceModule(Protocol):
    """What a source's module offers. A plugin's module also has `Config` and `REVISION` (see config/kinds.py)."""

    def raw_files(self, source: Any, folders: Folders, *, cache: Path) -> list[RawFile]:
        """The source's files in the order of their records. Raises ValueError if there is nothing to read.

        `folders` are the folders of the source's packages; `cache` is where scans of files are kept.
        """

    def read(self, source: Any, folders: Folders, span: Span) -> Iterator[list[Record | Dropped]]:
        """One list for each raw record of the span, in order; empty if it is blank or `span.takes` refuses it."""


class ImageUrls(Protocol):
    """What the module of a source offers besides if `vila-ops data download` can fetch its images by URL."""

    URL_FILES: tuple[str, ...]
    """The suffixes of the raw files."""

    def image_urls(self, source: Any, path: Path) -> Iterator[object]:
        """The URL of every image of one raw file that the source may use, in order.

        Raises ValueError for a file of another format.
        """


def digest(source: Source, *, cache: Path) -> str:
    """Digest of everything that the source reads: its packages, or else its files."""
    return digest_and_missing(source, cache=cache)[0]


def digest_and_missing(source: Source, *, cache: Path) -> tuple[str, str]:
    """The digest; and, if none of the images that the records refer to is on this machine, what is missing, else ""."""
    if packages := source.packages():
        return packages_digest(packages), ""
    raw = raw_files(source, {}, cache=cache)
    return digest_of(raw), _missing_images(source, raw)


def digest_of(raw: Sequence[RawFile]) -> str:
    """Digest of the files of a source that is not packaged."""
    return fingerprint([[file.name, file.digest] for file in raw])


def _missing_images(source: Source, raw: list[RawFile]) -> str:
    named, images = sum(file.beside for file in raw), getattr(source, "images", None)
    if named and named == sum(file.beside_missing for file in raw):
        return f"none of the {named} files that its records name is there"
    if isinstance(images, str) and any(file.images for file in raw) and not raw_path(images).is_dir():
        return f"no folder {images}"
    return ""


def raw_files(source: Source, folders: Folders, *, cache: Path) -> list[RawFile]:
    """The source's files, see `SourceModule.raw_files`. The packages of a packaged source count as one file."""
    return _module(source).raw_files(source, folders, cache=cache)


def check_images(source: Source) -> None:
    """Raise ValueError for a folder of images that is not there: once, and not for each record."""
    images = getattr(source, "images", None)
    if isinstance(images, str) and not raw_path(images).is_dir():
        raise ValueError(
            f"no such folder: {images} (looked for in {Path.cwd()}); set `images` to the folder of the images"
        )


def read(source: Source, folders: Folders, span: Span, *, known: Known = NOTHING) -> Iterator[list[Record | Dropped]]:
    """One list of records for each raw record that the span takes. Spans can be read in any order.

    `known` is what a scan saw. Raises RawChanged if the raw file of the span, or a file that its records name, is
    another one, at the end of the span at the latest.
    """
    known.check(span.path)
    with known.applied():
        records = iter(_module(source).read(source, folders, span))
    for number in count(span.start):
        with known.applied():
            made = next(records, None)
        if made is None:
            break
        if span.takes(number):
            yield made
    known.check(span.path)


def _module(source: Source) -> SourceModule:
    return cast(SourceModule, module_of(GROUP, SOURCES, source.kind))
