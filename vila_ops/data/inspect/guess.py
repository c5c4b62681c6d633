"""Detect the format of a path from the content of its files."""

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, get_args

from pydantic import TypeAdapter

from vila_ops.config import Config
from vila_ops.config.kinds import module_of
from vila_ops.config.load import merge
from vila_ops.config.sources import JsonLines, OwnFiles, OwnSource, Source
from vila_ops.data.inspect.table_layout import settings_of
from vila_ops.data.raw.files import files_below
from vila_ops.data.raw.json_array import elements, is_array, is_spread
from vila_ops.data.raw.lines import GZIP, ZIP, every_line, opened
from vila_ops.data.raw.objects import SCHEMES, ObjectPath, raw_path
from vila_ops.data.raw.text import json_object
from vila_ops.data.sources import GROUP, SOURCES
from vila_ops.data.sources.html import SUFFIXES as PAGES
from vila_ops.data.sources.jsonl import RECORDS
from vila_ops.data.sources.llava_cc3m import CHAT, METADATA
from vila_ops.data.sources.rows import holds_files, is_binary, open_parquet
from vila_ops.data.sources.table import SEPARATORS
from vila_ops.data.sources.table import URL_FILES as TABLES
from vila_ops.data.sources.vflan import PICKLES

UNKNOWN_LICENCE = "NOASSERTION"
"""SPDX's value for an unstated licence."""
_SAMPLES = 3
"""Number of files of each suffix that are read."""
_LINES = 20
"""Lines of a file that are read until one shows its format."""
_HEAD = 1 << 16
_OTHERS = {
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it (`zstd -d`)",
    b"BZh": "compressed by bzip2; unpack it (`bunzip2`)",
    b"\xfd7zXZ\x00": "compressed by xz; unpack it (`unxz`)",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive; unpack it",
    b"Rar!": "a RAR archive; unpack it",
    b"\xd0\xcf\x11\xe0": "a spreadsheet or another document of Office; save it as CSV in UTF-8",
    b"SQLite format 3": "an SQLite database; export a CSV",
    b"ARROW1": "an Arrow file; write it as Parquet",
    GZIP: "a gzip archive; unpack it",
}
"""First bytes of files of no format, and what they are."""
_CLASSES: dict[str, type[OwnFiles | JsonLines]] = {
    kind.model_fields["kind"].default: kind for kind in get_args(OwnSource) if issubclass(kind, OwnFiles | JsonLines)
}
KINDS = tuple(sorted(_CLASSES))


def guess(
    uri: str, *, kind: str | None = None, images: str | None = None, own: Mapping[str, Any] | None = None
) -> Source:
    """The source at a file or folder, of the given kind or of the detected one.

    Image paths are relative to `images`, or else to the folder itself. `own` are further settings of the source, by
    their dotted names, which take precedence. Raises ValueError if there is no such path, if the content is of no
    format or of several, and if `images` would have no effect.
    """
    path = raw_path(uri)
    if "://" in uri and not isinstance(path, ObjectPath):
        raise ValueError(f"{uri} is not read where it lies, as {', '.join(SCHEMES)} are; copy it, and name the copy")
    if not path.exists():
        raise ValueError(f"no such file or folder: {uri}")
    kind = kind or _kind_of(path)
    fields = _config_of(kind).model_fields
    folder = path if path.is_dir() else path.parent
    settings: dict[str, Any] = {"kind": kind, "path": uri, "licence": UNKNOWN_LICENCE}
    if kind == "jsonl":
        settings = {"kind": kind, "path": str(folder), "render": "conversation"}
    if "images" in fields:
        settings["images"] = images or str(folder)
    elif images is not None:
        raise ValueError(f"--images has no effect on the format {kind}, whose images lie in or beside its files")
    if kind == "table":
        shown = [one for file in _samples(path) if _is_table(file) and (one := settings_of(file)) is not None]
        settings |= shown[0] if shown else {}
    for key, value in (own or {}).items():
        for part in reversed(key.split(".")):
            value = {part: value}
        settings = merge(settings, value)
    source: Source = TypeAdapter(Source).validate_python(settings)
    return source


def _config_of(kind: str) -> type[Config]:
    """The config class of a format, or of a kind that a plugin adds."""
    if kind in _CLASSES:
        return _CLASSES[kind]
    if kind in SOURCES:
        raise ValueError(f"{kind!r} reads pinned packages, not files; the formats of files are {', '.join(KINDS)}")
    config: type[Config] = module_of(GROUP, SOURCES, kind).Config
    return config


def _kind_of(path: Path) -> str:
    if path.is_dir():
        if (path / RECORDS).is_file():
            return "jsonl"
        if (path / CHAT).is_file() and (path / METADATA).is_file():
            return "llava_cc3m"
    files = list(_samples(path))
    kinds = {kind: file for file in files if (kind := _kind_of_file(file)) is not None}
    if not kinds and (told := next(filter(None, map(_told, files)), None)):
        raise ValueError(f"cannot tell the format of {path}: {told}")
    if len(kinds) != 1:
        seen = " and ".join(f"{kind} ({file.name})" for kind, file in sorted(kinds.items())) or "nothing that is known"
        raise ValueError(f"cannot tell the format of {path}: found {seen}; name it with --format: {', '.join(KINDS)}")
    return next(iter(kinds))


def _samples(path: Path) -> Iterator[Path]:
    """The file itself, or the first files of each suffix in a folder."""
    if path.is_file():
        yield path
        return
    seen: Counter[str] = Counter()
    for _, file in sorted(files_below(path)):
        if not file.is_file():
            continue
        seen[file.suffix.lower()] += 1
        if seen[file.suffix.lower()] <= _SAMPLES:
            yield file


def _kind_of_file(path: Path) -> str | None:
    """The kind of a file; None if it is of no format, such as an image or a note."""
    if path.name.lower().endswith(PICKLES):
        return "vflan"  # whose error explains why pickles are not read
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if head.startswith(b"PAR1"):
        return _kind_of_parquet(path)
    if head[257:262] == b"ustar":
        return "webdataset"
    if head.startswith((GZIP, ZIP)):
        with opened(path) as unpacked:
            head = unpacked.read(_HEAD)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"["):
        return _kind_of_object(next((value for _, value in elements(path)), None)) if is_array(path) else None
    if text.startswith(b"{"):
        return next((kind for value in _objects(path) if (kind := _kind_of_object(value))), None)
    if text[:1] == b"<" and (path.suffix.lower() in PAGES or b"<html" in text.lower() or b"<body" in text.lower()):
        return "html"
    if path.suffix.lower() in SEPARATORS or (_is_table(path) and settings_of(path)):
        return "table"
    return None


def _objects(path: Path) -> Iterator[Any]:
    """The values of the first lines that are not blank."""
    lines = (line for _, line in every_line(path) if line.strip())
    return (json_object(line, where=str(path)) for line in islice(lines, _LINES))


def _told(path: Path) -> str | None:
    """What a file of no known format is, and what to do; None if neither its bytes nor its first record say it."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if name := next((name for magic, name in _OTHERS.items() if head.startswith(magic)), None):
        return f"{path} is {name}"
    if not head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith((b"{", b"[")):
        return None
    if is_spread(path):
        return f"{path} has an object over several lines; write one on each: jq -c . {path.name} > NEW.jsonl"
    first = next((value for _, value in elements(path)), None) if is_array(path) else next(_objects(path), None)
    if isinstance(first, dict):
        keys = ", ".join(map(repr, first))
        return (
            f"the first record of {path} has the keys {keys[:200]}; a record has `conversations` (LLaVA), `messages` "
            f"(chat messages), or those of another format in docs/your-data.md"
        )
    return None


def _kind_of_object(value: Any) -> str | None:
    match value:
        case {"messages": list()}:
            return "messages"
        case {"conversations": list()}:
            return "llava"
        case {"text_list": _, "image_info": _}:
            return "mmc4"
        case {"texts": list(), "images": list()}:
            return "interleaved"
        case {"turns": list(), "provenance": _}:
            return "jsonl"
        case {"inputs": _, "targets": _}:
            return "flan"
        case {"instruction": _, "outputs": _} | {"question": _, "answer": _} | {"question": _, "answer:": _}:
            return "vflan"
        case _:
            return None


def _kind_of_parquet(path: Path) -> str | None:
    with open_parquet(path) as file:
        schema = file.schema_arrow
    names = set(schema.names)
    if {"inputs", "targets"} <= names:
        return "flan"
    if {"url", "text", "clip_similarity_vitb32"} <= names:
        return "coyo"
    if {"texts", "images"} <= names and not holds_files(schema.field("images").type):
        return "interleaved"  # the images of The Cauldron, which has these columns too, are in the file
    return "hf_parquet" if any(holds_files(field.type) or is_binary(field.type) for field in schema) else None


def _is_table(path: Path) -> bool:
    return path.suffix.lower() in TABLES
