"""Images that records refer to by a path inside one folder, or contain as base64.

The message of a fault has the name in the record and not the folder's path: it is sealed with the dataset, whose digest
must be the same on every machine.
"""

import base64
import binascii
import hashlib
from pathlib import Path, PurePath, PurePosixPath

from vila_ops.data.raw.files import MAX_NAME_BYTES, content, on_disk
from vila_ops.data.raw.objects import ObjectPath, raw_path
from vila_ops.data.raw.text import fault
from vila_ops.data.records import Image, Turn
from vila_ops.data.sources.faults import Fault

MAX_BYTES = 1 << 26
"""Limit for one encoded image."""
MAX_PATH_BYTES = 4000
"""Limit of file systems for a whole path."""


def path_inside(folder: str | None, name: str) -> Path:
    """The path of an image in the folder; its name may be absolute. Raises Fault for a path outside, or no folder."""
    if folder is None:
        raise Fault("missing_image", f"the record names {name!r}, but the source has no `images`; set that folder")
    path = PurePosixPath(name)
    if path.is_absolute():
        own = raw_path(folder)
        roots = [root for root in (own.absolute(), own.resolve()) if path.is_relative_to(root)]
        path = path.relative_to(roots[0]) if roots else path
    if not path.parts or path.is_absolute() or ".." in path.parts or fault(name) or is_too_long(path):
        raise Fault(
            "bad_image_path",
            f"{name[:200]!r} is not a path inside the folder `images`; write it relative to it, without '..'",
        )
    return raw_path(folder) / path


def is_too_long(path: PurePath) -> bool:
    """Whether the path exceeds the limits of file systems, for which `is_file` would raise."""
    return len(str(path).encode()) > MAX_PATH_BYTES or any(len(part.encode()) > MAX_NAME_BYTES for part in path.parts)


def read_image(folder: str | None, name: str) -> Image:
    """The image of that name. Raises Fault: missing_image, bad_image_path (also for a link), image_too_big."""
    place = path_inside(folder, name)
    path = on_disk(place)
    if not isinstance(path, ObjectPath) and path.is_file() and not _is_inside(path, folder or ""):
        raise Fault("bad_image_path", f"{name!r} is a link out of the folder `images`; put the image itself there")
    data = content(place, most=MAX_BYTES)
    if data is None:
        raise Fault("missing_image", f"no file {name!r} in the folder `images`; {_way_to(path, name)}")
    if len(data) > MAX_BYTES:
        size = path.stat().st_size
        raise Fault("image_too_big", f"{name!r} has {size} bytes, more than {MAX_BYTES}; scale it down")
    return Image(data)


def _is_inside(path: Path, folder: str) -> bool:
    return path.resolve().is_relative_to(Path(folder).resolve())


def _way_to(path: Path, name: str) -> str:
    """The way out for an image that is not there, by how its name is written."""
    if "\\" in name:
        return "folders are parted by /, not by \\ as in Windows: write / in the record"
    if name != name.strip():
        return "the record has blanks around the name: remove them"
    others = (path.with_name(path.name.lower()), path.with_suffix(path.suffix.swapcase()))
    if near := next((other.name for other in others if not is_too_long(other) and other.is_file()), None):
        return f"there is {near!r}: write the name in the same case"
    return "put it there, or set `images` to its folder"


def from_base64(text: str) -> Image:
    """The image of a base64 text, in which white space is ignored. Raises Fault: bad_base64, image_too_big."""
    if len(text) > MAX_BYTES * 4 // 3 + 4:
        raise Fault("image_too_big", f"{len(text)} characters of base64, more than {MAX_BYTES} bytes; scale it down")
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Fault("bad_base64", f"{text[:20]!r}... is not base64 ({error})") from error
    if not data:
        raise Fault("bad_base64", "no bytes; an image is the base64 of an image file")
    return Image(data)


def object_of(image: str | None, turns: tuple[Turn, ...], *, id: str) -> str:
    """The key of the split: file name or digest of the first image; without images the id, or the text's digest.

    So an image, or a text without an id, that occurs again in the source is in the same split.
    """
    if image is not None:
        return PurePosixPath(image).name.lower()
    parts = [part for turn in turns for part in turn.parts]
    if images := [part for part in parts if isinstance(part, Image)]:
        return hashlib.sha256(images[0].data).hexdigest()
    return id.lower() or hashlib.sha256(str(parts[0]).encode()).hexdigest()
