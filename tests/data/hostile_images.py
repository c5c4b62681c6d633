"""HostileImage files that attack a decoder, and a process that decodes them under limits: run by test_images_fuzz.py.

    python tests/data/hostile_images.py named | fuzzed COUNT

Prints the name of each file before it is decoded, so that a crash is named, and after it `= OUTCOME SECONDS BYTES`: the
outcome is `image`, a reason, or what else was raised; the bytes are the growth of resident memory at its peak.
"""

import io
import random
import signal
import struct
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow

from vila_ops.config.images import ImageReading, Jpeg, Webp
from vila_ops.data.containers import BadImage
from vila_ops.data.images import Fit, square

CPU_SECONDS = 20.0
FUZZED_MAX_PIXELS = 1_000_000
SIDE = 32
FITS = (Fit("pad", (0.5, 0.5, 0.5)), Fit("resize", (0.5, 0.5, 0.5)), Fit("crop", (0.5, 0.5, 0.5)))
PAIRS = Path(__file__).parents[1] / "tiny/pairs"


def main() -> None:
    files = named() if sys.argv[1] == "named" else fuzzed(int(sys.argv[2]))
    limits: dict[str, Any] = {} if sys.argv[1] == "named" else {"max_pixels": FUZZED_MAX_PIXELS, "truncated": "read"}
    warnings.simplefilter("error")
    square(
        next(iter(seeds().values())), size=SIDE, fit=FITS[0], encoding=Jpeg()
    )  # what decoders load once counts for no file
    for number, (name, make) in enumerate(files):
        data = make()
        print(name, flush=True)  # noqa: T201 what the test reads
        before = _memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        started = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # its signal ends the process, inside C code too
        reading = ImageReading(**limits, decode=("exact", "scaled")[number % 2])
        found = outcome(data, reading, fit=FITS[number % 3])
        signal.setitimer(signal.ITIMER_PROF, 0)
        growth = max(0, _memory("VmHWM") - before)
        print("=", found, f"{time.process_time() - started:.3f}", growth, flush=True)  # noqa: T201


def outcome(data: bytes, reading: ImageReading, *, fit: Fit) -> str:
    """`image`, or the reason, or the exception that should not have come."""
    try:
        made = square(data, size=SIDE, fit=fit, encoding=Webp(), reading=reading)
    except BadImage as error:
        return error.reason
    except BaseException as error:  # noqa: BLE001 that nothing else is raised is what is tested
        return f"raised:{type(error).__name__}:{error}".replace(" ", "_").replace("\n", "_")
    with Pillow.open(io.BytesIO(made)) as image:
        return "image" if (image.size, image.mode) == ((SIDE, SIDE), "RGB") else f"wrong:{image}"


def _memory(field: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024


def encoded(image: Pillow.Image, kind: str, **more: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **more)
    return out.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    """A PNG chunk."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(*chunks: bytes, width: int = 8, height: int = 8, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG with these chunks before its data, which is black; sizes above 64 get data for 64 x 64 only."""
    row = b"\0" + bytes(min(width, 64) * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour] * depth // 8)
    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    end = chunk(b"IDAT", zlib.compress(row * min(height, 64))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + start + b"".join(chunks) + end


def segment(code: int, body: bytes) -> bytes:
    """A JPEG segment."""
    return bytes((0xFF, code)) + struct.pack(">H", len(body) + 2) + body


def seeds() -> dict[str, bytes]:
    """A small real image in every format and mode that is read."""
    with Pillow.open(PAIRS / "dog.png") as opened:
        rgba = opened.convert("RGBA")
    rgb, palette = rgba.convert("RGB"), rgba.convert("RGB").quantize(64)
    second, exif = rgb.transpose(Pillow.Transpose.ROTATE_90), turned()
    frames: dict[str, Any] = {"save_all": True, "append_images": [second], "duration": 50}
    return {
        "png_rgb": encoded(rgb, "PNG"),
        "png_rgba": encoded(rgba, "PNG"),
        "png_palette": encoded(palette, "PNG"),
        "png_palette_alpha": encoded(palette, "PNG", transparency=bytes(range(64))),
        "png_grey": encoded(rgb.convert("L"), "PNG", exif=exif),
        "png_grey_alpha": encoded(rgba.convert("LA"), "PNG"),
        "png_bit": encoded(rgb.convert("1"), "PNG"),
        "png_grey_16": encoded(rgb.convert("I;16"), "PNG"),
        "png_rgb_16": png(width=16, height=16, depth=16, colour=2),
        "png_rgba_16": png(width=16, height=16, depth=16, colour=6),
        "apng": encoded(rgba, "PNG", **frames),
        "jpeg": encoded(rgb, "JPEG"),
        "jpeg_exif": encoded(rgb, "JPEG", exif=exif, quality=95, subsampling=0),
        "jpeg_progressive": encoded(rgb, "JPEG", progressive=True),
        "jpeg_restarts": encoded(rgb, "JPEG", restart_marker_blocks=2),
        "jpeg_grey": encoded(rgb.convert("L"), "JPEG"),
        "jpeg_cmyk": encoded(rgb.convert("CMYK"), "JPEG"),
        "mpo": encoded(rgb, "MPO", save_all=True, append_images=[second]),
        "webp": encoded(rgb, "WEBP", exif=exif),
        "webp_alpha": encoded(rgba, "WEBP"),
        "webp_lossless": encoded(rgba, "WEBP", lossless=True),
        "webp_animated": encoded(rgba, "WEBP", **frames),
        "gif": encoded(palette, "GIF"),
        "gif_transparent": encoded(palette, "GIF", transparency=3),
        "gif_animated": encoded(rgb, "GIF", **frames),
        "bmp_rgb": encoded(rgb, "BMP"),
        "bmp_rgba": encoded(rgba, "BMP"),
        "bmp_palette": encoded(palette, "BMP"),
        "bmp_bit": encoded(rgb.convert("1"), "BMP"),
        "bmp_coded": coded_bmp(8, 8, b"\x08\x01\x00\x00" * 8),
        "tiff": encoded(rgb, "TIFF", exif=exif),
        "tiff_big_endian": encoded(Pillow.fromarray(np.asarray(rgb.convert("I;16")).astype(">u2")), "TIFF"),
        "tiff_lzw": encoded(rgba, "TIFF", compression="tiff_lzw"),
        "tiff_deflate": encoded(palette, "TIFF", compression="tiff_adobe_deflate"),
        "tiff_jpeg": encoded(rgb, "TIFF", compression="jpeg"),
        "tiff_fax": encoded(rgb.convert("1"), "TIFF", compression="group4"),
        "tiff_pages": encoded(rgb.copy(), "TIFF", save_all=True, append_images=[second.copy()]),
        "avif": encoded(rgb, "AVIF", exif=exif),
        "avif_alpha": encoded(rgba, "AVIF", quality=100, subsampling="4:4:4"),
        "avif_animated": encoded(rgb, "AVIF", save_all=True, append_images=[rgb.rotate(180)]),
    }


def turned() -> Pillow.Exif:
    """The EXIF of a camera on its side."""
    exif = Pillow.Exif()
    exif[0x0112] = 6
    return exif


def tiff(*entries: tuple[int, int, int, int], width: int = 8, height: int = 8, more: bytes = b"") -> bytes:
    """A grey TIFF of these entries (tag, type, count, value), and zeros for its pixels."""
    usual = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 8), (279, 4, 1, 64)]
    named = {tag: (tag, *rest) for tag, *rest in [*usual, *entries]}
    table = b"".join(struct.pack("<HHLL", *named[tag]) for tag in sorted(named))
    return b"II*\0" + struct.pack("<LH", 8, len(named)) + table + bytes(4) + bytes(64) + more


def ispe(width: int, height: int) -> bytes:
    """The content of an AVIF's property of its size."""
    return b"ispe" + struct.pack(">LLL", 0, width, height)


def coded_bmp(width: int, height: int, runs: bytes) -> bytes:
    """A BMP of run-length coded palette indices."""
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(runs), 0, 0, 256, 0)
    table = b"".join(bytes((n, n, n, 0)) for n in range(256))
    return b"BM" + struct.pack("<IHHI", 54 + 1024 + len(runs) + 2, 0, 0, 54 + 1024) + head + table + runs + b"\x00\x01"


def many_scans(image: Pillow.Image, count: int) -> bytes:
    """A progressive JPEG whose last scan is there `count` times."""
    data = encoded(image, "JPEG", progressive=True)
    start = data.rfind(b"\xff\xda")
    return data[:start] + data[start:-2] * count + data[-2:]


def exif_bomb(tags: int, size: int) -> bytes:
    """A table of so many tags, each of which points at the same `size` bytes."""
    entries = b"".join(struct.pack("<HHII", tag % 0xFFFF, 7, size, 8) for tag in range(tags))
    return b"II*\0" + struct.pack("<I", 8 + size) + bytes(size) + struct.pack("<H", tags) + entries


def sized(data: bytes, at: int, form: str, *size: int) -> bytes:
    """The file with another size in its header."""
    return data[:at] + struct.pack(form, *size) + data[at + struct.calcsize(form) :]


def named() -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Files that each stand for one attack or one oddity; what becomes of each stands in test_images_fuzz.py."""
    whole = seeds()
    yield from ((name, lambda data=data: data) for name, data in whole.items())  # type: ignore[misc]
    frame = whole["jpeg"].find(b"\xff\xc0")
    with Pillow.open(PAIRS / "dog.png") as opened:
        sides = opened.size
    flat = Pillow.new("RGB", (3000, 2000))
    start, end = whole["jpeg"][:2], whole["jpeg"][2:]
    zeros = zlib.compress(bytes(64 * 2**20), 9)
    makers: dict[str, Callable[[], bytes]] = {
        "empty": lambda: b"",
        "one_pixel": lambda: png(width=1, height=1),
        "one_pixel_os2_bmp": lambda: b"BM" + struct.pack("<IHHIIHHHH", 30, 0, 0, 26, 12, 1, 1, 1, 24) + bytes(4),
        "narrow_jpeg": lambda: encoded(Pillow.new("L", (1, 65_500)), "JPEG"),
        "narrow_png": lambda: png(width=2**31 - 1, height=1),
        "no_width": lambda: png(width=0),
        "huge_png": lambda: png(width=30_000, height=30_000),
        "huge_jpeg": lambda: sized(whole["jpeg"], frame + 5, ">HH", 30_000, 30_000),
        "huge_webp": lambda: sized(whole["webp_animated"], 24, "<HBHB", 0x3FFE, 0, 0x3FFE, 0),
        "huge_gif": lambda: sized(whole["gif_animated"], 6, "<HH", 65_535, 65_535),
        "huge_gif_frame": lambda: sized(whole["gif"], whole["gif"].find(b",\0\0\0\0") + 5, "<HH", 65_535, 65_535),
        "huge_bmp": lambda: sized(whole["bmp_rgb"], 18, "<ii", 30_000, -30_000),
        "large_png_without_data": lambda: png(width=6_000, height=6_000),
        "large_webp": lambda: encoded(Pillow.new("RGBA", (4000, 2500), (9, 9, 9, 9)), "WEBP", lossless=True, method=0),
        "large_jpeg_turned": lambda: encoded(Pillow.new("RGB", (4000, 2500)), "JPEG", progressive=True, exif=turned()),
        "text_bomb_ztxt": lambda: png(*[chunk(b"zTXt", b"a\0\0" + zeros)] * 32),
        "text_bomb_itxt": lambda: png(*[chunk(b"iTXt", b"a\0\1\0\0\0" + zeros)] * 32),
        "icc_bomb": lambda: png(chunk(b"iCCP", b"a\0\0" + zeros)),
        "exif_bomb_png": lambda: png(chunk(b"eXIf", exif_bomb(60_000, 8 * 2**20))),
        "exif_bomb_jpeg": lambda: start + segment(0xE1, b"Exif\0\0" + exif_bomb(2_500, 30_000)) + end,
        "exif_bomb_webp": lambda: encoded(flat.resize((8, 8)), "WEBP", exif=exif_bomb(60_000, 8 * 2**20)),
        "exif_broken": lambda: start + segment(0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xff") + end,
        "icc_broken": lambda: start + segment(0xE2, b"ICC_PROFILE\0\x01\x09" + bytes(500)) + end,
        "metadata_of_58_mb": lambda: start + segment(0xED, b"Photoshop 3.0\0" + bytes(65_000)) * 900 + end,
        "segments_without_end": lambda: start + segment(0xEC, b"") * 5_000_000 + end,
        "chunks_without_end": lambda: png(chunk(b"tEXt", b"") * 1_000_000),
        "data_in_crumbs": lambda: png(chunk(b"IDAT", b"") * 1_000_000),
        "comments_without_end": lambda: whole["gif"][:13] + b"!\xfe\x01a\0" * 2_000_000 + whole["gif"][13:],
        "stray_bytes": lambda: whole["gif"][:13] + b"\x01" * 20_000_000 + whole["gif"][13:],
        "sixty_five_mb": lambda: whole["jpeg"] + bytes(65 * 2**20),
        "scans_1000_small": lambda: many_scans(flat.resize((64, 64)), 1_000),
        "scans_1000_large": lambda: many_scans(flat, 1_000),
        "scans_1000_largest": lambda: many_scans(Pillow.new("RGB", (7_300, 5_470)), 1_000),
        "runs_without_end": lambda: coded_bmp(1_000, 1_000, b"\x01\x01" * 990_000),
        "runs_of_many_pixels": lambda: coded_bmp(8_000, 5_000, b"\xff\x01" * 100_000),
        "arithmetic_jpeg": lambda: sized(whole["jpeg"], frame + 1, "B", 0xC9),
        "lossless_jpeg": lambda: sized(whole["jpeg"], frame + 1, "B", 0xC3),
        "half_with_end": lambda: whole["jpeg"][: len(whole["jpeg"]) // 2] + b"\xff\xd9",
        "followed_by_zip": lambda: whole["jpeg"] + b"PK\x03\x04" + bytes(1_000),
        "png_without_data": lambda: whole["png_rgb"][:33] + chunk(b"IEND", b""),
        "png_wrong_checksum": lambda: whole["png_rgb"][:60] + b"\xff" + whole["png_rgb"][61:],
        "big_tiff": lambda: encoded(flat.resize((4, 4)), "TIFF", big_tiff=True),
        "huge_tiff": lambda: tiff(width=40_000, height=40_000),
        "tiff_tile_bomb": lambda: tiff((322, 4, 1, 60_000), (323, 4, 1, 60_000), (324, 4, 1, 8), (325, 4, 1, 8)),
        "tiff_strips_without_end": lambda: tiff((273, 4, 2**20, 8), more=bytes(2**22)),
        "tiff_table_of_itself": lambda: tiff((273, 4, 1, 8), (330, 4, 1, 8), (34665, 4, 1, 8)),
        "tiff_of_another_coding": lambda: tiff((259, 3, 1, 34925)),
        "exif_bomb_tiff": lambda: exif_bomb(60_000, 8 * 2**20),
        "huge_avif": lambda: whole["avif"].replace(ispe(*sides), ispe(60_000, 60_000)),
        "phone_jpeg_turned": lambda: encoded(Pillow.new("RGB", (8160, 6120)), "JPEG", exif=turned()),
        "tall_png": lambda: encoded(Pillow.new("RGB", (8, 2**14)), "PNG"),
        "ico": lambda: encoded(flat.resize((16, 16)), "ICO"),
        "avif_without_image": lambda: b"\0\0\0\x20ftypavif" + bytes(100),
        "svg": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        "pdf": lambda: b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog >>\nendobj\n",
        "eps": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n",
        "html": lambda: b"<!DOCTYPE html><html><body>404</body></html>",
        "zip": lambda: b"PK\x03\x04" + bytes(100),
        "zero_bytes": lambda: bytes(1_000),
    }
    yield from makers.items()


def fuzzed(count: int) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """So many damaged files, always the same: every seed cut at each twentieth, then all kinds of damage in turn."""
    whole = seeds()
    done = 0
    for name, data in whole.items():
        for part in range(1, 20):
            if done < count:
                yield f"cut:{name}:{part * 5}%", lambda data=data, part=part: data[: len(data) * part // 20]  # type: ignore[misc]
                done += 1
    kinds = (_flip, _splice, _double, _resize, _noise)
    for number in range(count - done):
        draw = random.Random(number)
        name = draw.choice(sorted(whole))
        kind = kinds[number % len(kinds)]
        fixed = name.endswith("png") or name.startswith("png")

        def make(kind: Any = kind, name: str = name, draw: random.Random = draw, fix: bool = fixed) -> bytes:
            data: bytes = kind(whole[name], draw, whole)
            return _mend(data) if fix and draw.random() < 0.8 else data

        yield f"{kind.__name__}:{name}:{number}", make


def _flip(data: bytes, draw: random.Random, _: dict[str, bytes]) -> bytes:
    changed = bytearray(data)
    reach = draw.choice([64, 256, len(data)])
    for _bit in range(draw.choice([1, 2, 8, 64])):
        changed[draw.randrange(min(reach, len(data)))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _splice(data: bytes, draw: random.Random, whole: dict[str, bytes]) -> bytes:
    other = draw.choice([data, whole[draw.choice(sorted(whole))], draw.randbytes(64)])
    at, source = draw.randrange(len(data)), draw.randrange(len(other))
    return data[:at] + other[source : source + draw.randrange(200)] + data[at + draw.randrange(200) :]


def _double(data: bytes, draw: random.Random, _: dict[str, bytes]) -> bytes:
    """A chunk, segment or block again, once or a thousand times: from one place that looks like a start to another."""
    starts = [0, len(data)]
    for mark in (b"\xff", b"IDAT", b"IHDR", b"PLTE", b"tRNS", b"fcTL", b"!", b",", b"VP8", b"ANMF", b"ALPH"):
        back = 4 if mark.isupper() or mark in (b"tRNS", b"fcTL") else 0
        starts += [at - back for at in range(len(data)) if data.startswith(mark, at)][:20]
    first, last = sorted(draw.sample(starts, 2))
    return data[:last] + data[first:last] * draw.choice([1, 2, 1000 if last - first < 1000 else 3]) + data[last:]


def _resize(data: bytes, draw: random.Random, _: dict[str, bytes]) -> bytes:
    """Another width or height, as number of 1, 2, 3 or 4 bytes, where the formats keep them."""
    frame = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2")) + 5
    image = data.find(b",\0\0\0\0") + 5
    at = draw.choice([16, 20] if data[:4] == b"\x89PNG" else [18, 22, 28] if data[:2] == b"BM" else [6, 8, image])
    at = draw.choice([frame, frame + 2]) if data[:2] == b"\xff\xd8" else at
    at = draw.choice([21, 24, 26, 27, 28]) if data[:4] == b"RIFF" else at
    width = draw.choice([1, 2, 3, 4])
    value = draw.choice([0, 1, 2, 255, 256, 1000, 4096, 30_000, 65_535, 2**31 - 1, 2**32 - 1, draw.randrange(2**32)])
    return data[:at] + (value % 256**width).to_bytes(width, draw.choice(["big", "little"])) + data[at + width :]


def _noise(data: bytes, draw: random.Random, _: dict[str, bytes]) -> bytes:
    """Random bytes behind a right beginning."""
    return data[: draw.choice([3, 8, 16, 30, 64, 200])] + draw.randbytes(draw.choice([0, 10, 100, 3000]))


def _mend(data: bytes) -> bytes:
    """A damaged PNG with right checksums, so that the damage reaches the decoder."""
    out, at = [data[:8]], 8
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4])
        if end > len(data):
            break
        out.append(chunk(data[at + 4 : at + 8], data[at + 8 : end - 4]))
        at = end
    return b"".join(out) + data[at:]


if __name__ == "__main__":
    main()
