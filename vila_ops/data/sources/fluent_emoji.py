"""Fluent emoji: a 3-D render for each code point, with its CLDR name from emojibase-data."""

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from vila_ops.config.sources import FluentEmoji
from vila_ops.data.raw.files import Folders, RawFile, Span
from vila_ops.data.records import Dropped, Image, Record, Turn
from vila_ops.data.sources.object_names import object_name
from vila_ops.data.sources.packaged import packages_as_file, provenance, read_keys

ASSETS = "assets"
GROUPS = ("smileys-emotion", "people-body", "animals-nature", "food-drink", "travel-places", "activities", "objects")
"""Groups of emoji that show an object; not symbols and flags."""


def keys(folder: Path, names_folder: Path) -> list[str]:
    """File stems of the renders in GROUPS, sorted."""
    named = _names(names_folder)
    stems = (path.stem for path in (folder / ASSETS).glob("*.webp"))
    return sorted(stem for stem in stems if _plain(stem) in named)


def raw_files(source: FluentEmoji, folders: Folders, *, cache: Path) -> list[RawFile]:
    """The two packages as one file."""
    return packages_as_file(source, keys(folders[source.package.name], folders[source.names.name]))


def read(source: FluentEmoji, folders: Folders, span: Span) -> Iterator[list[Record | Dropped]]:
    """The record of each key."""
    folder, names_folder = folders[source.package.name], folders[source.names.name]
    return read_keys(keys(folder, names_folder), span, lambda key: _render(source, folder, names_folder, key))


def _render(source: FluentEmoji, folder: Path, names_folder: Path, key: str) -> Record:
    """The render of this key with its name as the caption."""
    label, category = _names(names_folder)[_plain(key)]
    path = f"{ASSETS}/{key}.webp"
    return Record(
        id=key,
        object=object_name(label),
        turns=(Turn("document", (Image((folder / path).read_bytes()), f"{label[:1].upper()}{label[1:]}.")),),
        category=category,
        licence=source.package.licence,
        provenance=provenance(source.package, path),
    )


@lru_cache(maxsize=2)
def _names(folder: Path) -> dict[str, tuple[str, str]]:
    """Plain hex code -> (label, "group/subgroup") of the base emoji; skin tones are listed inside them."""
    meta = json.loads((folder / "meta/groups.json").read_text(encoding="utf-8"))
    names = {}
    for emoji in json.loads((folder / "en/data.json").read_text(encoding="utf-8")):
        group = meta["groups"].get(str(emoji.get("group")))
        if group in GROUPS:
            names[_plain(emoji["hexcode"])] = (emoji["label"], f"{group}/{meta['subgroups'][str(emoji['subgroup'])]}")
    return names


def _plain(code: str) -> str:
    """Lower case without the variation selector, which only one of the two packages always writes."""
    return code.lower().replace("-fe0f", "")
