"""What is an image is told by its bytes, and hostile bytes get a word."""

import io
import random
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image as Pillow
from PIL import PngImagePlugin

from vila_ops.data.download.image import image_format
from vila_ops.data.download.outcome import Failure

WORDS = {"not_an_image", "broken_image", "too_many_pixels"}


def encoded(format: str, **more) -> bytes:
    out = io.BytesIO()
    Pillow.radial_gradient("L").convert("RGB").save(out, format, **more)
    return out.getvalue()


def word(data: bytes, max_pixels: int = 1_000_000) -> str:
    try:
        return image_format(data, max_pixels=max_pixels)
    except Failure as failure:
        return failure.outcome


@pytest.mark.parametrize(
    ("format", "extension"),
    [
        ("PNG", "png"),
        ("JPEG", "jpg"),
        ("WEBP", "webp"),
        ("GIF", "gif"),
        ("BMP", "bmp"),
        ("TIFF", "tif"),
        ("AVIF", "avif"),
    ],
)
def test_a_image_is_told_by_its_bytes_and_must_be_whole(format, extension):
    data = encoded(format)
    assert word(data) == extension
    assert word(data, max_pixels=256 * 256) == extension
    assert word(data, max_pixels=256 * 256 - 1) == "too_many_pixels"
    assert word(data[: len(data) // 2]) == "broken_image"


@pytest.mark.parametrize("format", ["ICO", "PPM", "EPS", "PDF", "TGA"])
def test_other_formats_are_none_of_ours(format):
    assert word(encoded(format)) == "not_an_image"


def test_the_committed_images_are_images(tiny: Path):
    assert {word(path.read_bytes()) for path in tiny.rglob("*.png")} == {"png"}


def test_a_text_chunk_that_unpacks_to_gigabytes_is_never_unpacked():
    bomb = PngImagePlugin.PngInfo()
    bomb.add_text("Comment", "x" * 30_000_000, zip=True)
    assert word(encoded("PNG", pnginfo=bomb)) == "png"


def test_a_header_that_announces_a_billion_pixels_is_refused_before_they_are_decoded():
    size = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + b"IHDR" + size + struct.pack(">I", zlib.crc32(b"IHDR" + size))
    assert word(b"\x89PNG\r\n\x1a\n" + header + b"\0\0\0\0IEND\xaeB`\x82") == "too_many_pixels"


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_flipped_bytes_give_a_format_or_a_word(format):
    draw, data = random.Random(0), encoded(format)
    for _ in range(60):
        flipped = bytearray(data)
        for _ in range(draw.randint(1, 8)):
            flipped[draw.randrange(min(len(data), 400))] = draw.randrange(256)
        assert word(bytes(flipped)) in WORDS | {"png", "jpg", "webp", "gif", "bmp"}
