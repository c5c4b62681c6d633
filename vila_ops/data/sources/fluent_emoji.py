"""Fluent emoji: a 3-D render for each code point, with its CLDR name from emojibase-data."""

from collections.abc import Iterator
from pathlib import Path

from vila_ops.config.sources import FluentEmoji
from vila_ops.data.raw.files import Folders, RawFile, Span
from vila_ops.data.records import Dropped, Image, Record, Turn
from vila_ops.data.sources.emoji_names import caption_of, emoji_names, plain_code
from vila_ops.data.sources.object_names import object_name
from vila_ops.data.sources.packaged import packages_as_file, provenance, read_keys

ASSETS = "assets"


def keys(folder: Path, names_folder: Path) -> list[str]:
    """File stems of the renders that show an object, sorted."""
    named = emoji_names(names_folder)
    stems = (path.stem for path in (folder / ASSETS).glob("*.webp"))
    return sorted(stem for stem in stems if plain_code(stem) in named)


def raw_files(source: FluentEmoji, folders: Folders, *, cache: Path) -> list[RawFile]:
    """The two packages as one file."""
    return packages_as_file(source, keys(folders[source.package.name], folders[source.names.name]))


def read(source: FluentEmoji, folders: Folders, span: Span) -> Iterator[list[Record | Dropped]]:
    """The record of each key."""
    folder, names_folder = folders[source.package.name], folders[source.names.name]
    return read_keys(keys(folder, names_folder), span, lambda key: _render(source, folder, names_folder, key))


def _render(source: FluentEmoji, folder: Path, names_folder: Path, key: str) -> Record:
    """The render of this key with its name as the caption."""
    label, category = emoji_names(names_folder)[plain_code(key)]
    path = f"{ASSETS}/{key}.webp"
    return Record(
        id=key,
        object=object_name(label),
        turns=(Turn("document", (Image((folder / path).read_bytes()), caption_of(label))),),
        category=category,
        licence=source.package.licence,
        provenance=provenance(source.package, path),
    )
