"""The settings of a table that its first line shows: separator, columns, and which of them is what."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vila_ops.config.sources import Separator
from vila_ops.data.raw.lines import opened
from vila_ops.data.raw.tables import Layout, fields_of
from vila_ops.data.sources.table import CHARACTERS, SEPARATORS

_HEAD = 1 << 16
_IMAGES = ("image", "image_name", "file_name", "filename", "image_path")
_TEXTS = ("text", "caption", "comment")
"""Usual names of the two columns, in lower case; that of an answer is text or answer."""
_IMAGE = re.compile(r"(?!https?:).*\S\.(jpe?g|png|webp|gif|bmp|tiff?|avif)(#[0-9]+)?", re.IGNORECASE)
_URL = re.compile(r"https?://\S+")
_ORDER: tuple[Separator, ...] = ("tab", "pipe", "semicolon", "comma")


def settings_of(path: Path) -> dict[str, Any] | None:
    """The settings that differ from the defaults; None if the first line has no column of images.

    A first line with the name or the URL of an image has no names of columns.
    """
    with opened(path) as file:
        line = file.read(_HEAD).partition(b"\n")[0].decode("utf-8-sig", "replace").rstrip("\r")
    separator, fields = _fields(path, line)
    settings: dict[str, Any] = {} if separator == SEPARATORS.get(path.suffix.lower()) else {"separator": separator}
    if len(fields) < 2:
        return None
    image, url = _first(fields, _IMAGE), _first(fields, _URL)
    if image is not None or url is not None:
        names = [f"column_{number}" for number in range(1, len(fields) + 1)]
        texts = [number for number in range(len(fields)) if number not in (image, url)]
        for number, name in ((url, "url"), (image, "image"), (texts[0] if texts else None, "text")):
            if number is not None:
                names[number] = name
        return settings | {"columns": names} | ({} if image is not None else {"image_url": "url"})
    named = {name.lower(): name for name in fields}
    images = [named[name] for name in _IMAGES if name in named]
    if not images and "url" not in named:
        return None
    settings |= {"image": images[0]} if images else {"image_url": named["url"]}
    texts_named = [named[name] for name in (*_TEXTS, "answer") if name in named]
    settings |= {"text": texts_named[0]} if texts_named else {}
    if "question" in named:
        settings |= {"question": named["question"], "render": "conversation"}
    defaults = {"image": "image", "text": "text"}
    return {key: value for key, value in settings.items() if defaults.get(key) != value}


def _fields(path: Path, line: str) -> tuple[Separator | None, list[str]]:
    """The first separator that separates columns, that of the file's name before all others, and the columns."""
    own = SEPARATORS.get(path.suffix.lower())
    fields: list[str] = []
    for name in sorted(_ORDER, key=lambda one: one != own):
        fields = [one.strip() for one in fields_of(line, _layout(name))]
        if len(fields) > 1:
            return name, fields
    return own, fields


def _layout(separator: Separator) -> Layout:
    return Layout(separator=CHARACTERS[separator], quotes=separator != "tab", columns=None)


def _first(fields: Sequence[str], pattern: re.Pattern[str]) -> int | None:
    return next((number for number, field in enumerate(fields) if pattern.fullmatch(field)), None)
