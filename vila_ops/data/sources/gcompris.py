"""GCompris boards: a title, an encyclopedic paragraph and a photo, inside Qt resource files (.rcc)."""

import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from vila_ops.config.sources import GCompris
from vila_ops.data.raw.files import Folders, RawFile, Span
from vila_ops.data.records import Dropped, Image, Record, Turn
from vila_ops.data.sources.object_names import object_name
from vila_ops.data.sources.packaged import packages_as_file, provenance, read_keys

RESOURCES = "usr/share/gcompris-qt/rcc"
_ACTIVITIES = "gcompris/src/activities/"
_STRING = r'"((?:[^"\\]|\\.)*)"'
_ENTRY = re.compile(r"\{[^{}]*\}")
_TITLE = re.compile(rf'"title":\s*qsTr\({_STRING}\)')
_TEXT = re.compile(rf'"text":\s*qsTr\({_STRING}\)')
_PHOTO = re.compile(r'"image2?":\s*"qrc:/([^"]+\.(?:webp|png|jpe?g))"')

# Layout of a .rcc: 'qres', then big-endian version, and the offsets of tree, data and names.
_HEADER = struct.Struct(">4s4I")
_NODE = struct.Struct(">IHII")
_NODE_BYTES = {1: 14, 2: 22, 3: 22}
_DEFLATED, _FOLDER, _ZSTD = 1, 2, 4


def keys(folder: Path) -> list[str]:
    """FILE.rcc/PATH/OF/BOARD.qml#ENTRY of all entries that have a title and a paragraph, sorted."""
    entries = []
    for file in sorted((folder / RESOURCES).glob("*.rcc")):
        resource = file.read_bytes()
        for path, node in resource_nodes(resource).items():
            if "/resource/board/" in path and path.endswith(".qml"):
                board = resource_content(resource, node).decode("utf-8")
                entries += [f"{file.name}/{path}#{number:03d}" for number, _ in _entries(board)]
    return sorted(entries)


def raw_files(source: GCompris, folders: Folders, *, cache: Path) -> list[RawFile]:
    """The package as one file."""
    return packages_as_file(source, keys(folders[source.package.name]))


def read(source: GCompris, folders: Folders, span: Span) -> Iterator[list[Record | Dropped]]:
    """The record of each key."""
    folder = folders[source.package.name]
    return read_keys(keys(folder), span, lambda key: _entry(source, folder, key))


def _entry(source: GCompris, folder: Path, key: str) -> Record | Dropped:
    """The entry of this key: its photo, if the package has it, then title and paragraph."""
    place, _, number = key.partition("#")
    file, _, path = place.partition("/")
    board = _load(folder, file, path)
    entry = dict(_entries(board.decode("utf-8") if board else ""))[int(number)]
    title, text = (_unescape(match[1]) for match in (_TITLE.search(entry), _TEXT.search(entry)) if match)
    photo_path = _PHOTO.search(entry)
    photo = _photo(folder, photo_path[1]) if photo_path else None
    caption = f"{title}. {text}"
    licence = source.package.licence
    if photo is not None and photo_path:
        licence = f"{licence} (text), {_photo_licence(folder, photo_path[1]) or licence} (photo)"
    return Record(
        id=key,
        object=object_name(title),
        turns=(Turn("document", (caption,) if photo is None else (photo, caption)),),
        category=file.removesuffix(".rcc"),
        licence=licence,
        provenance=provenance(source.package, f"{RESOURCES}/{key}"),
    )


def resource_nodes(resource: bytes) -> dict[str, tuple[int, int]]:
    """Path -> (offset of its content, flags) of all files in a Qt resource file."""
    magic, version, tree, data, names = _HEADER.unpack_from(resource)
    if magic != b"qres" or version not in _NODE_BYTES:
        raise ValueError(f"not a Qt resource file of version 1 to 3: starts with {resource[:8]!r}")
    nodes: dict[str, tuple[int, int]] = {}

    def name(offset: int) -> str:
        (length,) = struct.unpack_from(">H", resource, names + offset)
        start = names + offset + 6  # after the length and a hash
        return resource[start : start + 2 * length].decode("utf-16-be")

    def walk(index: int, folder: str) -> None:
        name_offset, flags, first, second = _NODE.unpack_from(resource, tree + index * _NODE_BYTES[version])
        path = folder + name(name_offset) if index else ""
        if flags & _FOLDER:
            for child in range(second, second + first):
                walk(child, f"{path}/" if path else "")
        else:
            nodes[path] = (data + second, flags)

    walk(0, "")
    return nodes


def resource_content(resource: bytes, node: tuple[int, int]) -> bytes:
    """The bytes of one file, inflated."""
    offset, flags = node
    (length,) = struct.unpack_from(">I", resource, offset)
    content = resource[offset + 4 : offset + 4 + length]
    if flags & _ZSTD:
        raise ValueError("the resource file is compressed with zstd, which is not supported; pin a version with zlib")
    return zlib.decompress(content[4:]) if flags & _DEFLATED else content  # 4 bytes: the inflated size


def _entries(board: str) -> Iterator[tuple[int, str]]:
    """Number and QML text of a board's entries that have a title and a paragraph."""
    for number, match in enumerate(_ENTRY.finditer(board)):
        if _TITLE.search(match[0]) and _TEXT.search(match[0]):
            yield number, match[0]


def _load(folder: Path, file: str, path: str) -> bytes | None:
    resource_file = folder / RESOURCES / file
    if not resource_file.is_file():
        return None
    resource = resource_file.read_bytes()
    node = resource_nodes(resource).get(path)
    return resource_content(resource, node) if node else None


def _photo(folder: Path, path: str) -> Image | None:
    data = _load(folder, _resource_file(path), path)
    return Image(data) if data else None


def _photo_licence(folder: Path, path: str) -> str | None:
    """The photo's licence in the nearest README above it: paragraphs of "License: ..." and a list of files."""
    parts = path.split("/")
    for depth in range(len(parts) - 1, 3, -1):
        readme = _load(folder, _resource_file(path), "/".join([*parts[:depth], "README"]))
        if readme is not None:
            photo = "/".join(parts[depth:])
            for paragraph in readme.decode("utf-8").split("\n\n"):
                stated = re.search(r"^License: *(.+)$", paragraph, flags=re.MULTILINE)
                if stated and photo in paragraph.splitlines():
                    return stated[1].strip()
    return None


def _resource_file(path: str) -> str:
    """The resource file of a path; each activity has one of its name."""
    return f"{path.removeprefix(_ACTIVITIES).split('/')[0]}.rcc"


def _unescape(text: str) -> str:
    """The content of a QML string literal as text on one line."""
    return " ".join(re.sub(r"\\(.)", lambda match: " " if match[1] == "n" else match[1], text).split())
