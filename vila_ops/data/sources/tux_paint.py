"""Tux Paint stamps: an image, and a text file of the same name whose first line is its English caption."""

from collections.abc import Iterator
from pathlib import Path

from vila_ops.config.sources import TuxPaint
from vila_ops.data.raw.files import Folders, RawFile, Span
from vila_ops.data.records import Dropped, Image, Record, Turn
from vila_ops.data.sources.object_names import object_name
from vila_ops.data.sources.packaged import packages_as_file, provenance, read_keys

STAMPS = "usr/share/tuxpaint/stamps"
_NO_OBJECTS = "symbols"
"""The folder of letters, signs and coins."""
_STYLES = ("cartoon", "toys", "plastic")
"""Folders named after a style of drawing, not after an object."""


def keys(folder: Path) -> list[str]:
    """Paths of the PNG stamps that have a caption, relative to the stamps' root, sorted."""
    root = folder / STAMPS
    stamps = (path.relative_to(root) for path in root.rglob("*.png") if path.with_suffix(".txt").is_file())
    return sorted(path.as_posix() for path in stamps if path.parts[0] != _NO_OBJECTS)


def raw_files(source: TuxPaint, folders: Folders, *, cache: Path) -> list[RawFile]:
    """The package as one file."""
    return packages_as_file(source, keys(folders[source.package.name]))


def read(source: TuxPaint, folders: Folders, span: Span) -> Iterator[list[Record | Dropped]]:
    """The record of each key."""
    folder = folders[source.package.name]
    return read_keys(keys(folder), span, lambda key: _stamp(source, folder, key))


def _stamp(source: TuxPaint, folder: Path, key: str) -> Record | Dropped:
    """The stamp of this key with its caption."""
    image = folder / STAMPS / key
    lines = image.with_suffix(".txt").read_text(encoding="utf-8").splitlines()
    caption = clean_caption(lines[0] if lines else "")
    if not caption:
        return Dropped(id=key, reason="no_text")
    return Record(
        id=key,
        object=object_name(caption),
        turns=(Turn("document", (Image(image.read_bytes()), caption)),),
        category=category(key),
        licence=source.package.licence,
        provenance=provenance(source.package, f"{STAMPS}/{key}"),
    )


def category(key: str) -> str:
    """The folder without styles: animals/birds/cartoon/tux.png -> animals/birds."""
    return "/".join(part for part in key.split("/")[:-1] if part not in _STYLES)


def clean_caption(line: str) -> str:
    """The line with single spaces, no leading dash, and one full stop at the end; empty if it has no words."""
    text = " ".join(line.split()).lstrip("-–— ").rstrip(" .!?…")
    return f"{text}." if text else ""
