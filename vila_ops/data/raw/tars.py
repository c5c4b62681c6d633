"""Members of a plain tar with their offsets. Nothing is ever extracted.

Only regular files and folders are accepted: USTAR, GNU long names, and the `path` and `size` of pax headers.
"""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from vila_ops.data.raw.text import fault

BLOCK = tarfile.BLOCKSIZE
MAX_ENTRIES = 1_000_000
MAX_EXTENSION_BYTES = 64 * 1024
"""Bytes of one long name or pax header, which is read as a whole before its member."""
_EXTENSIONS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME)
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE)
_KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a fifo",
    tarfile.GNUTYPE_LONGLINK: "a link",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
_WAYS = {
    tarfile.LNKTYPE: "write it with `tar --hard-dereference`",
    tarfile.SYMTYPE: "write it with `tar --dereference`",
    tarfile.GNUTYPE_SPARSE: "write it without --sparse",
}
"""How GNU tar puts the content of such a member into the archive."""


class BadTar(ValueError):
    """A tar that is damaged or has a member that is not accepted; the message states the byte."""


@dataclass(frozen=True, slots=True)
class Member:
    """One regular file in a tar."""

    name: str
    head: int
    """Offset of its first header, in bytes."""
    data: int
    """Offset of its content, in bytes."""
    size: int


def members(file: BinaryIO, *, start: int = 0) -> Iterator[Member]:
    """The regular files from the header at byte `start` to the end of the tar. Raises BadTar at the first fault."""
    end = file.seek(0, os.SEEK_END)
    head = offset = start
    entries = 0
    overrides: dict[str, str] = {}
    while (header := _header(file, offset, end)) is not None:
        entries += 1
        if entries > MAX_ENTRIES:
            raise BadTar(f"more than {MAX_ENTRIES:,} entries; write it as several tars")
        is_extension = header.type in _EXTENSIONS
        data, size = offset + BLOCK, _size(header, {} if is_extension else overrides, offset)
        if data + size > end:
            raise BadTar(f"truncated: {header.name!r} at byte {offset} needs {size} bytes, {end - data} are there")
        offset = data + -(-size // BLOCK) * BLOCK
        if is_extension:
            overrides |= _extension(file, header, data)
            continue
        name = _checked_name(overrides.get("path", header.name), head)
        if header.type in _REGULAR:
            yield Member(name=name, head=head, data=data, size=size)
        elif header.type != tarfile.DIRTYPE or size:
            kind = _KINDS.get(header.type, f"of type {header.type!r}")
            way = _WAYS.get(header.type, "leave it out")
            raise BadTar(f"{name!r} at byte {head} is {kind}; a tar of data holds files and folders only: {way}")
        head, overrides = offset, {}
    if overrides:
        raise BadTar(f"truncated: a header at byte {head} belongs to no member")
    _check_rest(file, offset, end)


def _header(file: BinaryIO, offset: int, end: int) -> tarfile.TarInfo | None:
    """The header at an offset; None at the block of zeros that ends a tar."""
    file.seek(offset)
    block = file.read(BLOCK)
    if len(block) < BLOCK:
        raise BadTar(f"truncated: it ends at byte {end} without the two blocks of zeros that end a tar; write it again")
    if not any(block):
        return None
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise BadTar(f"no tar header at byte {offset} ({error}); write it again") from error


def _size(header: tarfile.TarInfo, overrides: dict[str, str], offset: int) -> int:
    """Size of a member in bytes; a pax header takes precedence."""
    text = overrides.get("size", str(header.size))
    if not (text.isascii() and text.isdigit() and len(text) <= 20):
        raise BadTar(f"{header.name!r} at byte {offset} has the size {text[:20]!r}, which is not a number of bytes")
    return int(text)


def _extension(file: BinaryIO, header: tarfile.TarInfo, data: int) -> dict[str, str]:
    """The `path` and `size` that an extension header sets for the next member."""
    if header.size > MAX_EXTENSION_BYTES:
        raise BadTar(
            f"an extension header of {header.size} bytes at byte {data - BLOCK}; {MAX_EXTENSION_BYTES} at most"
        )
    file.seek(data)
    content = file.read(header.size)
    if header.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": content.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    records = _pax(content, data)
    if sparse := [key for key in records if key.startswith("GNU.sparse")]:
        raise BadTar(
            f"the header at byte {data - BLOCK} has {sparse[0]}: a sparse file; write the tar without --sparse"
        )
    overrides: dict[str, str] = {key: records[key] for key in ("path", "size") if key in records}
    if header.type != tarfile.XGLTYPE:
        return overrides
    if overrides:
        raise BadTar(f"a global header at byte {data - BLOCK} sets {', '.join(overrides)} of all members at once")
    return {}


def _pax(content: bytes, data: int) -> dict[str, str]:
    """Records "LENGTH KEY=VALUE\\n" (POSIX.1-2001, pax)."""
    records: dict[str, str] = {}
    while content:
        digits = content[:8].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        record, content = content[:length], content[length:]
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if not (key and equals and len(record) == length and record.endswith(b"\n")):
            raise BadTar(f"the pax header at byte {data - BLOCK} is damaged")
        records[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
    return records


def _checked_name(name: str, head: int) -> str:
    """The member's name. Names are never used as paths, but a tar with such names was not written as data."""
    if not name or name.startswith("/") or ".." in name.split("/"):
        raise BadTar(f"{name!r} at byte {head} is absolute, empty or has '..'; names are relative, inside the tar")
    if wrong := fault(name):
        raise BadTar(f"the name {name!r} at byte {head} is not text ({wrong}); names are UTF-8")
    return name


def _check_rest(file: BinaryIO, offset: int, end: int) -> None:
    """Raise BadTar unless only zeros follow the end: an appended tar would be silently ignored."""
    file.seek(offset)
    while block := file.read(1 << 20):
        if any(block):
            raise BadTar(
                f"it ends at byte {offset}, but {end - offset} bytes follow that are not all zeros; "
                f"put tars together with `tar --concatenate`, not `cat`"
            )
