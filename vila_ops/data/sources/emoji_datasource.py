"""Emoji of one vendor from emoji-datasource, 64 pixels wide, with their CLDR names from emojibase-data."""

from collections.abc import Iterator
from pathlib import Path

from vila_ops.config.sources import EmojiDatasource
from vila_ops.data.raw.files import Folders, RawFile, Span
from vila_ops.data.records import Dropped, Image, Record, Turn
from vila_ops.data.sources.emoji_names import caption_of, emoji_names, plain_code
from vila_ops.data.sources.object_names import object_name
from vila_ops.data.sources.packaged import packages_as_file, provenance, read_keys

IMAGES = "img/*/64/*.png"
"""A package has the images of one vendor."""


def keys(folder: Path, names_folder: Path) -> list[str]:
    """Paths of the images that show an object, sorted."""
    named = emoji_names(names_folder)
    images = (path.relative_to(folder).as_posix() for path in folder.glob(IMAGES) if plain_code(path.stem) in named)
    return sorted(images)


def raw_files(source: EmojiDatasource, folders: Folders, *, cache: Path) -> list[RawFile]:
    """The two packages as one file."""
    return packages_as_file(source, keys(folders[source.package.name], folders[source.names.name]))


def read(source: EmojiDatasource, folders: Folders, span: Span) -> Iterator[list[Record | Dropped]]:
    """The record of each key."""
    folder, names_folder = folders[source.package.name], folders[source.names.name]
    return read_keys(keys(folder, names_folder), span, lambda key: _image(source, folder, names_folder, key))


def _image(source: EmojiDatasource, folder: Path, names_folder: Path, path: str) -> Record:
    """The image at this path with its name as the caption."""
    code = Path(path).stem
    label, category = emoji_names(names_folder)[plain_code(code)]
    return Record(
        id=code,
        object=object_name(label),
        turns=(Turn("document", (Image((folder / path).read_bytes()), caption_of(label))),),
        category=category,
        licence=source.package.licence,
        provenance=provenance(source.package, path),
    )
