"""Read sources: which packages one needs, its work items, and the records of an item. One file a source kind."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import assert_never

from vila_ops.config.data import (
    FluentEmoji,
    GCompris,
    GimpHelp,
    GnomeHelp,
    JsonLines,
    Package,
    Source,
    TuxPaint,
    WordNet,
)
from vila_ops.data.records import Dropped, Record
from vila_ops.data.sources import fluent_emoji, gcompris, gimp_help, gnome_help, jsonl, tux_paint, wordnet


def packages(source: Source) -> tuple[Package, ...]:
    """What must be fetched before the source can be read; nothing for a folder of one's own."""
    match source:
        case TuxPaint() | GimpHelp() | GCompris() | WordNet() | GnomeHelp():
            return (source.package,)
        case FluentEmoji():
            return (source.package, source.names)
        case JsonLines():
            return ()
        case _:
            assert_never(source)


def keys(source: Source, folders: Mapping[str, Path]) -> list[str]:
    """The source's work items in a fixed order, `limit` of them evenly spaced at most; `folders` by package name."""
    every = _all_keys(source, folders)
    if source.limit is None or source.limit >= len(every):
        return every
    return [every[place * len(every) // source.limit] for place in range(source.limit)]


def _all_keys(source: Source, folders: Mapping[str, Path]) -> list[str]:
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
        case JsonLines():
            return jsonl.keys(source)
        case _:
            assert_never(source)


def read(source: Source, folders: Mapping[str, Path], key: str) -> Iterator[Record | Dropped]:
    """The records of one work item. It depends on nothing but its arguments, so items can be read in any order."""
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
        case JsonLines():
            return jsonl.read(source, key)
        case _:
            assert_never(source)
