"""Encoded images reduced to what their pixels need, so that a decoder gets nothing else.

A decoder reads everything that a file contains: texts and profiles that inflate to gigabytes, a million empty segments,
EXIF tables that point at each other, second frames. Here each container is walked once, in time linear in its bytes and
without inflating anything. The result has the header, the palette, the transparency and the data of the first frame;
of the metadata only the orientation is read.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

Format = Literal["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"]
"""Recognised by content, never by file name. Formats that can run programs (EPS, SVG, PDF) are not supported. A phone's
MPO is read as the JPEG that it starts with, and of a TIFF the first page."""
Reason = Literal[
    "empty", "not_an_image", "unsupported", "truncated", "corrupt", "too_many_bytes", "too_many_pixels", "too_narrow",
    "too_complex",
]  # fmt: skip

MAX_BYTES = 64 * 2**20
MAX_PARTS = 2**17
"""Segments, chunks or sub-blocks of one file; each takes a decoder about 2 us."""
MAX_SCAN_PIXELS = 2**30
"""Scans x pixels of a progressive JPEG: every scan visits every block, at 1 to 4 ns per pixel (measured). Encoders
write about ten scans, so that an image of the default max_pixels is read."""
MAX_RLE_PIXELS = 1_000_000
"""Pixels of a run-length coded BMP, which Pillow decodes in Python at up to 0.2 us per pixel."""

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
JPEG_END = b"\xff\xd9"
READ_AHEAD = 16
JPEG_MARKER = re.compile(rb"\xff+([^\x00\xff])", re.DOTALL)
JPEG_FRAMES = {0xC0, 0xC1, 0xC2}
"""Baseline, extended and progressive, with Huffman codes; browsers do not show lossless, hierarchical or arithmetic."""
JPEG_OTHER_FRAMES = {*range(0xC3, 0xD0)} - {0xC4, 0xC8, 0xCC}
JPEG_BARE = {0x01, *range(0xD0, 0xD9)}
"""Markers without a length: TEM, RST0-7, SOI."""
XMP_HEAD = b"http://ns.adobe.com/xap/1.0/\x00"
XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
ORIENTATION = 0x0112
EXIF_INTEGERS = {3: "H", 4: "L", 6: "b", 8: "h", 9: "l"}
"""TIFF 6.0 types SHORT, LONG, SBYTE, SSHORT and SLONG, as struct letters."""

TIFF_MAGIC = (b"II*\x00", b"MM\x00*")
"""Of classic TIFF; BigTIFF has 43 in place of 42 (*)."""
TIFF_KEPT = (
    256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 332, 338, 339, 347,
    529, 530, 531, 532,
)  # fmt: skip
"""Tags (TIFF 6.0 and its supplements) that say where the pixels are and how they are coded."""
TIFF_LISTS = (258, 273, 279, 320, 324, 325, 338, 339, 347, 529, 530, 532)
"""Those of them that may have several values."""
TIFF_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}
"""Bytes of a value of each type."""
TIFF_CODECS = {
    1: "none", 2: "CCITT", 3: "CCITT", 4: "CCITT", 5: "LZW", 7: "JPEG", 8: "Deflate", 32773: "PackBits",
    32946: "Deflate",
}  # fmt: skip
MAX_TILE_PIXELS = 2**24
"""Pixels of a tile of a TIFF, which is decoded whole, however small the image."""
AVIF_BRANDS = (b"avif", b"avis")
AVIF_MAJOR_BRANDS = (*AVIF_BRANDS, b"mif1", b"msf1")
AVIF_TURNS = {
    (1, None): 8, (2, None): 3, (3, None): 6, (0, 0): 4, (0, 1): 2, (1, 0): 5, (1, 1): 7, (2, 0): 2, (2, 1): 4,
    (3, 0): 7, (3, 1): 5,
}  # fmt: skip
"""EXIF orientation for quarter turns against the clock (irot) and a mirror after them (imir), ISO/IEC 23008-12. Mirror
0 exchanges top and bottom, 1 left and right."""
OTHER_FILES = (
    (b"<svg", "an SVG drawing"), (b"<?xml", "XML"), (b"<!doctype html", "a web page"), (b"<html", "a web page"),
    (b"%pdf", "a PDF"), (b"%!ps", "PostScript"), (b"pk\x03\x04", "a zip archive"), (b"\x1f\x8b", "a gzip archive"),
    (b"\x00\x00\x00\x0cjxl ", "JPEG XL"), (b"\xff\x0a", "JPEG XL"), (b"\x00\x00\x00\x0cjp  ", "JPEG 2000"),
    (b"8bps", "a Photoshop file"), (b"\x00\x00\x01\x00", "an icon"), (b"\x93numpy", "a NumPy array"),
    (b"version https://git-lfs", "a pointer of Git LFS (`git lfs pull` fetches the image)"),
)  # fmt: skip
"""Starts of other files, in lower case, and what they are."""


class BadImage(ValueError):
    """An image that cannot be decoded safely; such images are counted by `reason`."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason


@dataclass(frozen=True)
class Stripped:
    """An image file that holds one image and nothing else."""

    format: Format
    data: bytes
    width: int
    height: int
    orientation: int
    """EXIF 2.3 tag 0x0112; 1 if the file states none."""
    zeros: int = 0
    """Zeros at the end of a JPEG's data, in place of its end marker (see `_scans`)."""

    def with_end(self) -> bytes:
        """A JPEG with an end marker, so that a decoder fills missing data with grey instead of refusing the file."""
        return self.data[: len(self.data) - self.zeros] + JPEG_END


def strip(data: bytes) -> Stripped:
    """The file without metadata and with its first frame only. Raises BadImage."""
    if not data:
        raise BadImage("empty", "no bytes at all")
    if len(data) > MAX_BYTES:
        raise BadImage("too_many_bytes", f"{len(data)} bytes, more than {MAX_BYTES}")
    if data.startswith(PNG_MAGIC):
        return _png(data)
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data)
    if data.startswith((b"GIF87a", b"GIF89a")):
        return _gif(data)
    if data.startswith(b"BM"):
        return _bmp(data)
    if data.startswith(TIFF_MAGIC):
        return _tiff(data)
    if _is_avif(data):
        return _avif(data)
    raise BadImage("not_an_image", f"{_named(data)}none of the formats {', '.join(get_args(Format))}")


def _is_avif(data: bytes) -> bool:
    """Whether the first box says so: its major brand, which may be a general one, and the compatible brands."""
    brands = data[8 : min(int.from_bytes(data[:4]), 256)]
    is_general = data[4:8] == b"ftyp" and brands[:4] in AVIF_MAJOR_BRANDS
    return is_general and any(brands[at : at + 4] in AVIF_BRANDS for at in range(0, len(brands), 4))


def _named(data: bytes) -> str:
    """What a file is, if its first bytes say so, with a comma."""
    if data[4:8] == b"ftyp":
        return f"a file of the kind {data[8:12].decode('ascii', 'replace')!r} (HEIC photos and videos begin so), "
    if data[:4] in (b"II+\x00", b"MM\x00+"):
        return "a BigTIFF, "
    head = data[:64].lstrip().lower()
    return next((f"{name}, " for start, name in OTHER_FILES if head.startswith(start)), "")


def exif_orientation(exif: bytes) -> int | None:
    """The orientation in a block of EXIF (a TIFF header and its first table); None if it is missing or damaged."""
    while exif.startswith(b"Exif\x00\x00"):
        exif = exif[6:]
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None or len(exif) < 10 or struct.unpack_from(order + "H", exif, 2) != (42,):
        return None
    (start,) = struct.unpack_from(order + "L", exif, 4)
    if start + 2 > len(exif):
        return None
    (count,) = struct.unpack_from(order + "H", exif, start)
    table = exif[start + 2 : start + 2 + 12 * count]
    orientation: int | None = None
    for tag, kind, values, value in struct.iter_unpack(order + "HHL4s", table[: len(table) // 12 * 12]):
        if tag == ORIENTATION and values == 1 and kind in EXIF_INTEGERS:
            (orientation,) = struct.unpack_from(order + EXIF_INTEGERS[kind], value)
    return orientation


def _oriented(exif: bytes, xmp: bytes) -> int:
    """The orientation of EXIF, else of XMP, else 1."""
    orientation = exif_orientation(exif)
    if orientation is None and (match := XMP_ORIENTATION.search(xmp)):
        orientation = int(match[1])
    return 1 if orientation is None else orientation


def _png(data: bytes) -> Stripped:
    """Chunks are length, name, body, CRC. The CRCs of kept chunks are checked: Pillow does not check those of IDAT."""
    kept = [PNG_MAGIC]
    exif = xmp = b""
    at = len(PNG_MAGIC)
    for _ in range(MAX_PARTS):
        head = data[at : at + 8]
        end = at + 12 + int.from_bytes(head[:4])
        if len(head) < 8 or end > len(data):
            raise BadImage("truncated", "a PNG that ends before its IEND")
        name = head[4:]
        if name in PNG_KEPT:
            chunk = data[at:end]
            if zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:]):
                raise BadImage("corrupt", f"a PNG whose {name.decode()} does not have its checksum")
            kept.append(chunk)
        elif name == b"eXIf":
            exif = data[at + 8 : end - 4]
        elif name == b"iTXt" and data.startswith(b"XML:com.adobe.xmp\x00", at + 8):
            xmp = data[at + 8 : end - 4]
        if name == b"IEND":
            if len(kept) < 2 or len(kept[1]) != 25:
                raise BadImage("corrupt", "a PNG that does not begin with its IHDR")
            width, height = struct.unpack_from(">LL", kept[1], 8)
            return Stripped("PNG", b"".join(kept), width, height, _oriented(exif, xmp))
        at = end
    raise BadImage("too_complex", f"a PNG of more than {MAX_PARTS} chunks")


def _jpeg(data: bytes) -> Stripped:
    """Segments up to the first scan; after it only entropy-coded data and tables follow."""
    kept = [b"\xff\xd8"]
    exif = xmp = frame = b""
    at = 2
    for _ in range(MAX_PARTS):
        marker = JPEG_MARKER.search(data, at)
        if marker is None:
            raise BadImage("truncated", "a JPEG that ends before its first scan")
        code, at = marker[1][0], marker.end()
        if code in JPEG_BARE:
            continue
        segment = data[at : at + int.from_bytes(data[at : at + 2])]
        if code == 0xD9 or code in JPEG_OTHER_FRAMES:
            word: Reason = "corrupt" if code == 0xD9 else "unsupported"
            raise BadImage(word, f"a JPEG with marker {code:#x} before its first scan")
        if len(segment) < 2 or len(segment) < int.from_bytes(segment[:2]):
            raise BadImage("truncated", "a JPEG that ends inside its header")
        body = segment[2:]
        if code == 0xDA:
            if len(frame) < 6:
                raise BadImage("corrupt", "a JPEG whose first scan stands before its frame")
            scans, zeros = _scans(data[marker.end() - 2 :], frame=frame, progressive=b"\xff\xc2" in kept)
            height, width = struct.unpack_from(">HH", frame, 1)
            return Stripped("JPEG", b"".join([*kept, scans]), width, height, _oriented(exif, xmp), zeros)
        if code in JPEG_FRAMES:
            frame = body
        if code == 0xE1 and body.startswith(b"Exif\x00\x00"):
            exif = exif or body
        elif code == 0xE1 and body.startswith(XMP_HEAD):
            xmp = body
        elif code < 0xE0 or body.startswith((b"JFIF\x00", b"Adobe")):  # the last two define the colour space
            kept += [bytes((0xFF, code)), segment]
        at += len(segment)
    raise BadImage("too_complex", f"a JPEG of more than {MAX_PARTS} segments")


def _scans(data: bytes, *, frame: bytes, progressive: bool) -> tuple[bytes, int]:
    """The data after the header of a JPEG, changed so that the decoder notices missing data, and the zeros at its end.

    libjpeg fills missing data before the end marker with grey and only warns, which Pillow does not pass on. Without
    that marker it asks for more data instead, and Pillow refuses the file. The zeros are for the decoder's read-ahead.
    """
    if not progressive and data[4:5] == frame[5:6]:  # one scan has all components
        end = data.rfind(JPEG_END)
        return (data, 0) if end < 0 else (data[:end] + bytes(READ_AHEAD), READ_AHEAD)
    height, width = struct.unpack_from(">HH", frame, 1)
    scans = data.count(b"\xff\xda")  # in coded data 0xff is always followed by 0
    if scans * width * height > MAX_SCAN_PIXELS:
        raise BadImage("too_complex", f"a JPEG of {width} x {height} pixels in {scans} scans")
    return data, 0


def _webp(data: bytes) -> Stripped:
    """RIFF chunks. Nothing is removed: libwebp ignores metadata and decodes the first frame only."""
    exif = xmp = b""
    size = int.from_bytes(data[4:8], "little") + 8
    if size > len(data):
        raise BadImage("truncated", f"a WebP of {size} bytes, of which {len(data)} are there")
    at = 12
    for _ in range(MAX_PARTS):
        if at + 8 > size:
            return Stripped("WEBP", data, *_webp_size(data), _oriented(exif, xmp))
        name, length = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if name == b"EXIF":
            exif = data[at + 8 : at + 8 + length]
        elif name == b"XMP ":
            xmp = data[at + 8 : at + 8 + length]
        at += 8 + length + length % 2
    raise BadImage("too_complex", f"a WebP of more than {MAX_PARTS} chunks")


def _webp_size(data: bytes) -> tuple[int, int]:
    """Size of the canvas (RFC 9649): 2 x 24 bits minus one, or 2 x 14 bits, for lossless minus one."""
    name = data[12:16]
    if name == b"VP8X" and len(data) >= 30:
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if name == b"VP8 " and data[23:26] == b"\x9d\x01\x2a" and len(data) >= 30:
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    if name == b"VP8L" and data[20:21] == b"\x2f" and len(data) >= 25:
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    raise BadImage("corrupt", "a WebP without the header of an image")


def _gif(data: bytes) -> Stripped:
    """The screen, its palette, the last graphic control before the first image, and that image."""
    at = 13
    if len(data) < at:
        raise BadImage("truncated", "a GIF that ends inside its header")
    if data[10] & 0x80:
        at += 3 << ((data[10] & 7) + 1)
    head, control = data[:at], b""
    parts = 0
    while at < len(data) and data[at] != 0x3B:
        start = at
        parts += 1
        if parts > MAX_PARTS:
            raise BadImage("too_complex", f"a GIF of more than {MAX_PARTS} blocks before its first image ends")
        if data[at] == 0x21:
            at += 2
        elif data[at] == 0x2C:
            flags = data[at + 9] if at + 9 < len(data) else 0
            at += 11 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
        else:  # a stray byte: decoders skip it
            at += 1
            continue
        while at < len(data) and data[at]:
            parts += 1
            at += 1 + data[at]
        at += 1
        if at > len(data):
            break
        if data[start] == 0x2C:
            left, top, wide, high = struct.unpack_from("<HHHH", data, start + 1)
            width, height = struct.unpack_from("<HH", data, 6)
            size = max(width, left + wide), max(height, top + high)  # the screen grows to hold its image
            return Stripped("GIF", head + control + data[start:at] + b";", *size, 1)
        if data[start + 1] == 0xF9:
            control = data[start:at]
    raise BadImage("truncated", "a GIF that ends before its first image does")


def _bmp(data: bytes) -> Stripped:
    """Nothing is removed; only run-length codes can be slow. OS/2's header has 12 bytes, Windows's more."""
    if len(data) < 26:
        raise BadImage("truncated", "a BMP that ends inside its header")
    is_old = struct.unpack_from("<L", data, 14) == (12,)
    width, height = struct.unpack_from("<HH" if is_old else "<Ll", data, 18)
    height = abs(height)  # below zero: rows from the top
    is_coded = not is_old and data[30:31] in (b"\x01", b"\x02")
    if is_coded and (width * height > MAX_RLE_PIXELS or len(data) > 2 * MAX_RLE_PIXELS):
        raise BadImage("too_complex", f"a run-length coded BMP of {width} x {height} pixels, {len(data)} bytes")
    return Stripped("BMP", data, width, height, 1)


def _tiff(data: bytes) -> Stripped:
    """The first image: its table of tags is replaced, in its place, by one with the tags that the pixels need."""
    order = "<" if data.startswith(b"II") else ">"
    (start,) = struct.unpack_from(order + "L", data.ljust(8, b"\0"), 4)
    (count,) = struct.unpack_from(order + "H", data[start : start + 2].ljust(2, b"\0"))
    entries = data[start + 2 : start + 2 + 12 * count]
    if start < 8 or not count or len(entries) < 12 * count:
        raise BadImage("truncated", "a TIFF that ends before its table of tags does")
    by_tag: dict[int, bytes] = {}
    for at in range(0, len(entries), 12):
        by_tag.setdefault(struct.unpack_from(order + "H", entries, at)[0], entries[at : at + 12])
    kept = {tag: by_tag[tag] for tag in TIFF_KEPT if tag in by_tag and _is_whole_tag(order, tag, by_tag[tag], data)}
    numbers = {tag: _tiff_number(order, entry) for tag, entry in by_tag.items()}
    _check_tiff(numbers)
    table = struct.pack(order + "H", len(kept)) + b"".join(kept.values()) + bytes(4)
    whole = b"".join([data[:start], table.ljust(6 + 12 * count, b"\0"), data[start + 6 + 12 * count :]])
    return Stripped("TIFF", whole, numbers[256], numbers[257], numbers.get(ORIENTATION) or 1)


def _is_whole_tag(order: str, tag: int, entry: bytes, data: bytes) -> bool:
    """Whether a tag has values of a known type, as many as it may, in the file. Raises BadImage for too many."""
    _, kind, values, place = struct.unpack(order + "HHLL", entry)
    if values > MAX_PARTS:
        raise BadImage("too_complex", f"a TIFF with {values} values of tag {tag}")
    size = values * TIFF_BYTES.get(kind, 0)
    return size > 0 and (size <= 4 or place + size <= len(data)) and (values == 1 or tag in TIFF_LISTS)


def _tiff_number(order: str, entry: bytes) -> int:
    """The value of an entry that holds one SHORT or LONG, else 0."""
    _, kind, values = struct.unpack_from(order + "HHL", entry)
    return int(struct.unpack_from(order + EXIF_INTEGERS[kind], entry, 8)[0]) if values == 1 and kind in (3, 4) else 0


def _check_tiff(numbers: dict[int, int]) -> None:
    """Raise BadImage for a TIFF without a size, with tiles that fill memory, or in a coding that is not read."""
    if not (numbers.get(256) and numbers.get(257)):
        raise BadImage("corrupt", "a TIFF without width and height")
    if (codec := numbers.get(259, 1)) not in TIFF_CODECS:
        codecs = ", ".join(dict.fromkeys(TIFF_CODECS.values()))
        raise BadImage("unsupported", f"a TIFF of compression {codec}; read are {codecs}: save it again")
    if (pixels := numbers.get(322, 0) * numbers.get(323, 0)) > MAX_TILE_PIXELS:
        raise BadImage("too_complex", f"a TIFF with tiles of {pixels} pixels")


def _avif(data: bytes) -> Stripped:
    """Nothing is removed; size and orientation are properties of the primary item (ISO/IEC 23008-12)."""
    whole = {name: (start, end) for name, start, end in _boxes(data, 0, len(data))}
    if b"meta" not in whole:
        raise BadImage("unsupported", "an AVIF without a still image")
    start, end = whole[b"meta"]
    parts = {name: (start, end) for name, start, end in _boxes(data, start + 4, end)}
    inner = {name: (start, end) for name, start, end in _boxes(data, *parts.get(b"iprp", (0, 0)))}
    properties = list(_boxes(data, *inner.get(b"ipco", (0, 0))))
    primary = _primary_item(data[slice(*parts.get(b"pitm", (0, 0)))])
    size, turn, mirror = (0, 0), 0, None
    for index in _associated(data[slice(*inner.get(b"ipma", (0, 0)))], primary):
        name, start, end = properties[index - 1] if 0 < index <= len(properties) else (b"", 0, 0)
        if name == b"ispe" and end - start >= 12:
            width, height = struct.unpack_from(">LL", data, start + 4)
            size = width, height
        elif name == b"irot" and end > start:
            turn = data[start] & 3
        elif name == b"imir" and end > start:
            mirror = data[start] & 1
    if not all(size):
        raise BadImage("corrupt", "an AVIF without width and height")
    return Stripped("AVIF", data, *size, AVIF_TURNS.get((turn, mirror), 1))


def _boxes(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of the content of each box of a range (ISO/IEC 14496-12)."""
    for _ in range(MAX_PARTS):
        if at + 8 > end:
            return
        size, name = struct.unpack_from(">L4s", data, at)
        head = 8
        if size == 1 and at + 16 <= end:
            (size,), head = struct.unpack_from(">Q", data, at + 8), 16
        size = size or end - at
        if size < head or at + size > end:
            raise BadImage("truncated", "an AVIF that ends inside a box")
        yield name, at + head, at + size
        at += size
    raise BadImage("too_complex", f"an AVIF of more than {MAX_PARTS} boxes")


def _primary_item(content: bytes) -> int:
    """The id in a box `pitm`: a version, flags, and 2 or 4 bytes."""
    return int.from_bytes(content[4:6] if content[:1] == b"\0" else content[4:8])


def _associated(content: bytes, item: int) -> list[int]:
    """The indices, from 1, of an item's properties in a box `ipma`."""
    id_bytes, index_bytes = (2 if content[:1] == b"\0" else 4), (2 if content[3:4] == b"\1" else 1)
    at = 8
    while at + id_bytes < len(content):
        owner, count = int.from_bytes(content[at : at + id_bytes]), content[at + id_bytes]
        at += id_bytes + 1
        if owner == item:
            indices = (content[at + n * index_bytes : at + (n + 1) * index_bytes] for n in range(count))
            return [int.from_bytes(index) & (0x7FFF if index_bytes == 2 else 0x7F) for index in indices]
        at += count * index_bytes
    return []
