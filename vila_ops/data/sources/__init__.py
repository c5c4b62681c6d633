"""Read sources: which packages one needs, its raw files, and the records of a span. One file a source kind."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import assert_never

from vila_ops.config import Package, Source, fingerprint
from vila_ops.config.sources import (
    Coyo,
    Flan,
    FluentEmoji,
    GCompris,
    GimpHelp,
    GnomeHelp,
    HfParquet,
    Html,
    JsonLines,
    Llava,
    LlavaCc3m,
    Messages,
    Mmc4,
    Table,
    TuxPaint,
    Vflan,
    WebDataset,
    WordNet,
)
from vila_ops.data.raw.files import RawFile, Span
from vila_ops.data.records import Dropped, Record
from vila_ops.data.sources import (
    coyo,
    flan,
    fluent_emoji,
    gcompris,
    gimp_help,
    gnome_help,
    hf_parquet,
    html,
    jsonl,
    llava,
    llava_cc3m,
    messages,
    mmc4,
    table,
    tux_paint,
    vflan,
    webdataset,
    wordnet,
)

Packaged = TuxPaint | FluentEmoji | GimpHelp | GCompris | WordNet | GnomeHelp
Files = JsonLines | Llava | LlavaCc3m | Mmc4 | Coyo | Flan | Vflan | Messages | WebDataset | HfParquet | Html | Table


def packages(source: Source) -> tuple[Package, ...]:
    """What must be fetched before the source can be read; nothing for files of one's own."""
    match source:
        case TuxPaint() | GimpHelp() | GCompris() | WordNet() | GnomeHelp():
            return (source.package,)
        case FluentEmoji():
            return (source.package, source.names)
        case _:
            return ()


def digest(source: Source, *, cache: Path) -> str:
    """Of everything that the source reads."""
    if wanted := packages(source):
        return fingerprint([package.sha256 for package in wanted])
    return fingerprint([[file.name, file.digest] for file in raw_files(source, {}, cache=cache)])


def raw_files(source: Source, folders: Mapping[str, Path], *, cache: Path) -> list[RawFile]:
    """The source's files in the order of their records; `folders` by package name.

    A package is one file, whatever is in it. Raises ValueError where there is nothing to read.
    """
    match source:
        case TuxPaint() | FluentEmoji() | GimpHelp() | GCompris() | WordNet() | GnomeHelp():
            own, count = digest(source, cache=cache), len(_keys(source, folders))
            return [RawFile(name="package", path="", digest=own, count=count, images=count, marks=())]
        case JsonLines():
            return jsonl.raw_files(source, cache=cache)
        case Llava():
            return llava.raw_files(source, cache=cache)
        case LlavaCc3m():
            return llava_cc3m.raw_files(source, cache=cache)
        case Flan():
            return flan.raw_files(source, cache=cache)
        case Vflan():
            return vflan.raw_files(source, cache=cache)
        case Messages():
            return messages.raw_files(source, cache=cache)
        case Table():
            return table.raw_files(source, cache=cache)
        case Mmc4():
            return mmc4.raw_files(source, cache=cache)
        case Coyo():
            return coyo.raw_files(source, cache=cache)
        case WebDataset():
            return webdataset.raw_files(source, cache=cache)
        case HfParquet():
            return hf_parquet.raw_files(source, cache=cache)
        case Html():
            return html.raw_files(source, cache=cache)
        case _:
            assert_never(source)


def read(source: Source, folders: Mapping[str, Path], span: Span) -> Iterator[list[Record | Dropped]]:
    """For each raw record of a span that is taken, what it holds. Spans can be read in any order."""
    match source:
        case TuxPaint() | FluentEmoji() | GimpHelp() | GCompris() | WordNet() | GnomeHelp():
            for number, key in enumerate(_keys(source, folders)[span.start : span.stop], start=span.start):
                if span.takes(number):
                    yield list(_read_key(source, folders, key))
        case _:
            for number, found in enumerate(_read_files(source, span), start=span.start):
                if span.takes(number):
                    yield found


def _read_files(source: Files, span: Span) -> Iterator[list[Record | Dropped]]:
    match source:
        case JsonLines():
            return jsonl.read(source, span)
        case Llava():
            return llava.read(source, span)
        case LlavaCc3m():
            return llava_cc3m.read(source, span)
        case Flan():
            return flan.read(source, span)
        case Vflan():
            return vflan.read(source, span)
        case Messages():
            return messages.read(source, span)
        case Table():
            return table.read(source, span)
        case Mmc4():
            return mmc4.read(source, span)
        case Coyo():
            return coyo.read(source, span)
        case WebDataset():
            return webdataset.read(source, span)
        case HfParquet():
            return hf_parquet.read(source, span)
        case Html():
            return html.read(source, span)
        case _:
            assert_never(source)


def _keys(source: Packaged, folders: Mapping[str, Path]) -> list[str]:
    """A packaged source's records by key, in a fixed order."""
    match source:
        case TuxPaint():
            return tux_paint.keys(folders[source.package.name])
        case FluentEmoji():
            return fluent_emoji.keys(folders[source.package.name], folders[source.names.name])
        case GimpHelp():
            return gimp_help.keys(folders[source.package.name])
        case GCompris():
            return gcompris.keys(folders[source.package.name])
        case WordNet():
            return wordnet.keys(folders[source.package.name])
        case GnomeHelp():
            return gnome_help.keys(folders[source.package.name])
        case _:
            assert_never(source)


def _read_key(source: Packaged, folders: Mapping[str, Path], key: str) -> Iterator[Record | Dropped]:
    match source:
        case TuxPaint():
            return tux_paint.read(source, folders[source.package.name], key)
        case FluentEmoji():
            return fluent_emoji.read(source, folders[source.package.name], folders[source.names.name], key)
        case GimpHelp():
            return gimp_help.read(source, folders[source.package.name], key)
        case GCompris():
            return gcompris.read(source, folders[source.package.name], key)
        case WordNet():
            return wordnet.read(source, folders[source.package.name], key)
        case GnomeHelp():
            return gnome_help.read(source, folders[source.package.name], key)
        case _:
            assert_never(source)
