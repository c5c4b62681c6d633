"""WebDataset tars: consecutive members of one key are a record, KEY.jpg with KEY.txt or KEY.json.

The key is the name up to the first dot of its last part, as in the webdataset library (`key_ends`). KEY.txt is a
caption (`text_member`); KEY.json has `caption` or `text`, or LLaVA's `conversations`, and may have `license`, `url` and
numeric scores, as img2dataset writes them. The images are KEY.jpg and KEY.0.jpg, KEY.1.jpg, ... in the order of their
numbers. Other members, such as a mask KEY.seg.png, are no images of the record unless `image_members` names them.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, assert_never

from vila_ops.config.sources import WebDataset
from vila_ops.data.raw.files import STRIDE, Folders, RawFile, Scan, Span, paths, scan_files
from vila_ops.data.raw.objects import raw_path
from vila_ops.data.raw.tars import BadTar, Member, members
from vila_ops.data.raw.text import decoded
from vila_ops.data.records import Dropped, Image, Record, Turn
from vila_ops.data.sources.conversations import prompt_beside
from vila_ops.data.sources.faults import Fault, checked, finite_numbers, json_of
from vila_ops.data.sources.images import MAX_BYTES
from vila_ops.data.sources.json_files import stated
from vila_ops.data.sources.media import refuse_unread
from vila_ops.data.sources.turns import with_images

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
MAX_TEXT_BYTES = 16 * 2**20
_READ = ("conversations", "caption", "text", "key", "sha256")
_META = re.compile(r"__[^/]*__($|/)")
"""Names of metadata members, which the webdataset library skips too."""


def raw_files(source: WebDataset, folders: Folders, *, cache: Path) -> list[RawFile]:
    """The tars. Raises ValueError for a tar that is damaged or compressed, or has members other than files."""
    kind = f"{source.kind}:{source.key_ends}:{source.image_members}"
    tars = paths(raw_path(source.path), (".tar", *COMPRESSED))
    return scan_files(tars, kind, lambda path: _scan(source, path), cache=cache)


def read(source: WebDataset, folders: Folders, span: Span) -> Iterator[list[Record | Dropped]]:
    """The record of each key."""
    with span.file().open("rb") as file:
        groups = _groups(source, members(file, start=span.mark))
        for number, (key, group) in zip(range(span.start, span.stop), groups, strict=False):
            if not span.takes(number):
                yield []
                continue
            place = f"{span.name}:{key}"
            try:
                yield [_record(source, file, group, key=key, place=place)]
            except Fault as fault:
                yield [fault.dropped(place, where=place)]


def _record(source: WebDataset, file: BinaryIO, group: list[Member], *, key: str, place: str) -> Record:
    by_suffix = {_split(source, member.name)[1]: member for member in group}
    if len(by_suffix) < len(group):
        raise Fault("duplicate_member", f"several members of one suffix: {', '.join(m.name for m in group[:20])}")
    images = [Image(_content(file, by_suffix[suffix], MAX_BYTES)) for suffix in _images(source, list(by_suffix))]
    fields = _json(file, by_suffix)
    refuse_unread(fields, read=_READ, ignore=source.ignore, shown=[""] * len(images))
    messages: tuple[Turn, ...]
    notes: tuple[str, ...] = ()
    match source.render:
        case "caption":
            messages = (Turn("document", (*images, _caption(source, file, by_suffix, fields))),)
        case "conversation":
            system = prompt_beside(fields, source.ignore)
            messages, notes = with_images(fields.get("conversations"), images, system=system)
        case _:
            assert_never(source.render)
    return Record(
        id=place,
        object=key.lower(),
        turns=messages,
        category="",
        licence=stated(fields, "licence", "license") or source.licence,
        provenance=f"{place} {stated(fields, 'url')}".rstrip(),
        scores=finite_numbers(fields),
        notes=notes,
    )


def _images(source: WebDataset, suffixes: list[str]) -> list[str]:
    """The suffixes of the members that are the record's images, in their order."""
    if source.image_members is not None:
        return [suffix for suffix in source.image_members if suffix in suffixes]
    numbers = {suffix: _number(suffix) for suffix in suffixes if suffix.rpartition(".")[2] in IMAGES}
    return sorted(
        (suffix for suffix, number in numbers.items() if number is not None), key=lambda one: numbers[one] or 0
    )


def _json(file: BinaryIO, by_suffix: dict[str, Member]) -> dict[str, Any]:
    """The object in KEY.json; empty if there is none."""
    if "json" not in by_suffix:
        return {}
    member = by_suffix["json"]
    return json_of(_content(file, member, MAX_TEXT_BYTES), what=member.name)


def _caption(source: WebDataset, file: BinaryIO, by_suffix: dict[str, Member], fields: dict[str, Any]) -> str:
    if not _images(source, list(by_suffix)):
        text = f"no image KEY.jpg, KEY.0.jpg, ... but {_listed(by_suffix)}; name others in `image_members`"
        raise Fault("no_image", text)
    if source.text_member in by_suffix:
        try:
            text = decoded(_content(file, by_suffix[source.text_member], MAX_TEXT_BYTES))
        except UnicodeDecodeError as error:
            text = f"the .{source.text_member}: byte {error.start} is not UTF-8 ({error.reason})"
            raise Fault("invalid_utf8", text) from error
    else:
        text = next((fields[name] for name in ("caption", "text") if isinstance(fields.get(name), str)), "")
    if not text.strip():
        raise Fault(
            "no_text",
            f"no KEY.{source.text_member}, and no caption or text in a KEY.json, but {_listed(by_suffix)}; "
            f"`text_member` names another, render: conversation reads conversations, key_ends: last_dot keys with dots",
        )
    return checked(text.strip(), what="the caption")


def _content(file: BinaryIO, member: Member, limit: int) -> bytes:
    if member.size > limit:
        raise Fault("oversized", f"{member.name} has {member.size} bytes; {limit} at most")
    file.seek(member.data)
    return file.read(member.size)


def _listed(by_suffix: dict[str, Member]) -> str:
    return ", ".join(member.name for member in by_suffix.values())[:200]


def _number(suffix: str) -> int | None:
    """The number of the image NUMBER.jpg within its key, -1 for jpg alone; None for no image and for one of a name."""
    first, dot, last = suffix.rpartition(".")
    if last not in IMAGES:
        return None
    if not dot:
        return -1
    return int(first) if len(first) < 19 and first.isascii() and first.isdigit() else None


def _split(source: WebDataset, name: str) -> tuple[str, str]:
    """Key and suffix; the suffix is empty if the member belongs to no record."""
    folder, slash, last = name.rpartition("/")
    stem, _, suffix = last.partition(".") if source.key_ends == "first_dot" else last.rpartition(".")
    if last.startswith(".") or not stem or _META.match(name):  # macOS puts ._0001.jpg beside 0001.jpg
        return name, ""
    return f"{folder}{slash}{stem}", suffix.lower()


def _groups(source: WebDataset, members_of_tar: Iterable[Member]) -> Iterator[tuple[str, list[Member]]]:
    """Keys with their members."""
    belonging = (member for member in members_of_tar if _split(source, member.name)[1])
    for key, group in groupby(belonging, key=lambda member: _split(source, member.name)[0]):
        yield key, list(group)


def _scan(source: WebDataset, path: Path) -> Scan:
    if path.name.lower().endswith(COMPRESSED):
        raise ValueError(f"{path} is compressed, but records are read at their offsets; unpack it to a plain .tar")
    keys: set[str] = set()
    marks: list[int] = []
    images = 0
    with path.open("rb") as file:
        try:
            for key, group in _groups(source, members(file)):
                if key in keys:
                    way = "sort the members by name (`tar --sort=name`)"
                    raise BadTar(f"the key {key!r} occurs again at byte {group[0].head}; {way}")
                if len(keys) % STRIDE == 0:
                    marks.append(group[0].head)
                keys.add(key)
                images += len(_images(source, [_split(source, member.name)[1] for member in group]))
        except BadTar as error:
            raise ValueError(f"{path}: {error}") from error
    return Scan(count=len(keys), images=images, marks=tuple(marks))
