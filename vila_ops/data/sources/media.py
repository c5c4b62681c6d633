"""The media that an object of JSON or a row names: images are read, and any other medium refuses the record. Pure."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from vila_ops.data.records import Image
from vila_ops.data.sources.faults import Fault
from vila_ops.data.sources.images import from_base64, path_inside, read_image

IMAGE_KEYS = ("image", "images")
"""The keys under which the formats of LLaVA, LLaMA-Factory, ms-swift and TRL name the images of a record."""
_RECORD_KEYS = frozenset({"id", "url", "licence", "license"})
"""Keys that every source reads: none of them is a medium."""
_NAMES = {
    "image": "image", "img": "image", "picture": "image", "photo": "image",
    "video": "video", "audio": "audio", "media": "media", "multimedia": "media",
}  # fmt: skip
"""Words of keys that name a medium."""
_ABOUT = re.compile(
    r"(ids?|width|height|sizes?|resolution|ratio|count|num|number|total|has|is|captions?|description|text|ocr|alt|title"
    r"|hash|md5|sha|phash|licen[cs]e|author|credit|source|dataset|category|class|labels?|tags?|type|format|mode|scores?"
    r"|similarity|quality|date|time|duration|fps|rate|tokens?|index|idx|bbox(es)?|box(es)?|questions?|answers?|prompt"
    r"|model|domain|language|lang|style)"
)
"""Words of keys that say something about a medium and do not name it."""
_SUFFIXES = {
    **dict.fromkeys(["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic"], "image"),
    **dict.fromkeys(["mp4", "avi", "mov", "mkv", "webm", "m4v", "mpg", "mpeg"], "video"),
    **dict.fromkeys(["wav", "mp3", "flac", "ogg", "m4a", "aac", "opus"], "audio"),
}
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|[0-9]+")
_DATA = re.compile(r"data:(image|video|audio)\b")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_WAYS = {
    "image": "name images in `images`, remove the key",
    "video": "sample its frames and name them in `images`, remove the key",
}


def names_media(key: str) -> str | None:
    """The kind of medium that a key names by its words: image, video, audio or media; None if it is none."""
    words = [word.lower() for word in _WORD.findall(key)]
    if any(map(_ABOUT.fullmatch, words)):
        return None
    return next((kind for word in words if (kind := _NAMES.get(word) or _NAMES.get(word.removesuffix("s")))), None)


def is_absent(stated: object) -> bool:
    """Whether a value names no medium: null, empty, or a list or mapping of such values."""
    return not any(True for _ in _leaves(stated))


def refuse_unread(
    value: Mapping[str, Any], *, read: Collection[str], ignore: Collection[str] | None = None, shown: Sequence[str] = ()
) -> None:
    """Raise Fault (video, or unread_media) for a key that names media and is neither read nor ignored.

    `ignore` is the setting of the source, None for a mapping inside a record, to which it does not apply.
    `shown` are the paths or URLs of the images that the record shows, empty for one without a name. Another key may
    name one of them, or the address on the network that it came from; beside an image without a name, any image.
    """
    for key, stated in value.items():
        if key in read or key in (ignore or ()) or key in _RECORD_KEYS:
            continue
        kind = _kind(key, stated)
        if kind is None or (kind == "image" and shown and _is_of(stated, shown)):
            continue
        reason = "video" if kind == "video" else "unread_media"
        way = _WAYS.get(kind, "remove the key")
        hint = "" if ignore is None else f", or set `ignore: [{key}]` of the source"
        raise Fault(reason, f"`{key}` names {kind} that is not read: {repr(stated)[:80]}; {way}{hint}")


def stated_images(value: Mapping[str, Any]) -> list[str]:
    """The images that a record names under `image` or `images`, as paths or URLs. Raises Fault: malformed_image."""
    given = {key: value[key] for key in IMAGE_KEYS if value.get(key) not in (None, "", [], {})}
    if len(given) > 1:
        raise Fault("malformed_image", f"images are under `image` or `images`, not under both: {repr(given)[:80]}")
    for key, stated in given.items():
        addresses = [address(one) for one in (stated if isinstance(stated, list) else [stated])]
        if None in addresses:
            raise Fault("malformed_image", f"`{key}` is a path or a list of paths, not {repr(stated)[:80]}")
        return [one for one in addresses if one is not None]
    return []


def address(stated: object) -> str | None:
    """The path or URL of one image that a record states: text, or a mapping with `url`, `path` or `bytes` in base64."""
    match stated:
        case str(text) | {"url": str(text)} | {"path": str(text)} if text:
            return text
        case {"bytes": str(data)} if data:
            return f"data:;base64,{data}"
        case _:
            return None


def name_of(images: Sequence[str]) -> str | None:
    """The file name of the first image; None if there is none, or if it is inside the record."""
    return None if not images or images[0].startswith("data:") else images[0]


def file_of(image: str, folder: str | None) -> Path | None:
    """The path of an image in the folder of images; None if the image is inside the record. Raises Fault."""
    return None if image.startswith("data:") else path_inside(folder, _path(image))


def read(image: str, folder: str | None) -> Image:
    """The image at a path, or in a data: URL. Raises Fault, such as missing_image, remote_image or bad_base64."""
    if not image.startswith("data:"):
        return read_image(folder, _path(image))
    head, comma, data = image.partition(",")
    if not comma or not head.endswith(";base64"):
        raise Fault("bad_base64", f"{image[:40]!r} is not a data:TYPE;base64,... URL")
    return from_base64(data)


def _path(image: str) -> str:
    scheme = image.partition("://")[0].lower() if "://" in image else ""
    if scheme == "file":
        return image[len("file://") :]
    if scheme:
        way = "download it first, and write its path" if scheme.startswith("http") else "write a path"
        raise Fault("remote_image", f"{image[:80]!r} is not read while data is prepared; {way}")
    return image


def _kind(key: str, stated: object) -> str | None:
    """The kind of medium under a key, by its name or by what it holds; None if it is none."""
    leaves = [leaf for leaf in _leaves(stated) if isinstance(leaf, str | bytes)]
    if not leaves:
        return None
    if kind := names_media(key):
        return kind
    if any(isinstance(leaf, bytes) for leaf in leaves):
        return "media"
    if isinstance(stated, dict) or key.lower().endswith("id"):
        return None
    return next((kind for leaf in leaves if isinstance(leaf, str) and (kind := _kind_of_text(leaf))), None)


def _kind_of_text(text: str) -> str | None:
    """The kind of medium that text names by a data: URL, or by the suffix of a name without blanks."""
    if data := _DATA.match(text):
        return data[1]
    if any(character.isspace() for character in text):
        return None
    return _SUFFIXES.get(_file_name(text).rpartition(".")[2].lower()) if "." in text[1:] else None


def _is_of(stated: object, shown: Sequence[str]) -> bool:
    """Whether a value names only images that are shown, or where they came from."""
    names = {"" if name.startswith("data:") else _file_name(name) for name in shown}
    return all(
        isinstance(leaf, str)
        and (
            _ADDRESS.match(leaf) is not None
            or _file_name(leaf) in names
            or ("" in names and _kind_of_text(leaf) == "image" and not _DATA.match(leaf))
        )
        for leaf in _leaves(stated)
    )


def _file_name(text: str) -> str:
    path = re.split("[?#]", text, maxsplit=1)[0] if _ADDRESS.match(text) else text
    return PurePosixPath(path).name


def _leaves(stated: object) -> Iterator[object]:
    """The values inside lists and mappings that are neither null nor empty, in no order."""
    waiting = [stated]
    while waiting:
        one = waiting.pop()
        if isinstance(one, list):
            waiting.extend(one)
        elif isinstance(one, dict):
            waiting.extend(one.values())
        elif one is not None and one != "" and one != b"":
            yield one
