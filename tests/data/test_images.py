import io
import random
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vila_ops.data.images import BadImage, pixels, square


def encoded(picture: Pillow.Image, kind: str = "PNG", **more: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **more)
    return out.getvalue()


def decoded(data: bytes) -> np.ndarray[Any, Any]:
    with Pillow.open(io.BytesIO(data)) as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        return np.asarray(picture).copy()


def noise(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_a_square_of_the_asked_size_is_left_alone() -> None:
    array = noise(8, 8, 3)
    assert (decoded(square(encoded(Pillow.fromarray(array)), size=8)) == array).all()


def test_transparency_is_laid_on_white() -> None:
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (10, 20, 30, 255)
    rgba[0, 1] = (10, 20, 30, 0)
    rgba[1, 0] = (0, 0, 0, 51)  # a fifth of black: four fifths of 255 are left
    found = decoded(square(encoded(Pillow.fromarray(rgba)), size=2))
    assert found.tolist() == [[[10, 20, 30], [255, 255, 255]], [[204, 204, 204], [255, 255, 255]]]


def test_a_palette_with_a_transparent_colour_and_grey_with_alpha() -> None:
    palette = Pillow.fromarray(np.array([[0, 1], [1, 2]], np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    found = decoded(square(encoded(palette, transparency=1), size=2))
    assert found.tolist() == [[[255, 0, 0], [255, 255, 255]], [[255, 255, 255], [0, 0, 255]]]
    grey = Pillow.fromarray(np.array([[[7, 255], [7, 0]], [[9, 0], [9, 255]]], np.uint8), "LA")
    assert decoded(square(encoded(grey), size=2))[..., 0].tolist() == [[7, 255], [255, 9]]


def test_padding_is_white_and_centred() -> None:
    found = decoded(square(encoded(Pillow.new("RGB", (6, 2), (0, 0, 9))), size=6))
    assert (found[[0, 1, 4, 5]] == 255).all()
    assert (found[2:4] == (0, 0, 9)).all()


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_turns_are_undone(turn: int) -> None:
    upright = np.zeros((16, 16, 3), np.uint8)
    upright[:8, :8], upright[:8, 8:], upright[8:, :8] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    # how a camera held that way stores the same scene (EXIF 2.3, tag 0x0112)
    stored = [
        upright, upright[:, ::-1], upright[::-1, ::-1], upright[::-1], upright.transpose(1, 0, 2),
        np.rot90(upright, 1), upright[::-1, ::-1].transpose(1, 0, 2), np.rot90(upright, -1),
    ][turn - 1]  # fmt: skip
    exif = Pillow.Exif()
    exif[0x0112] = turn
    data = encoded(Pillow.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    assert (decoded(square(data, size=16)) == upright).all()


def test_sixteen_bits_of_grey_are_scaled() -> None:
    deep = Pillow.fromarray(np.array([[0, 65535], [32768, 257 * 7]], np.uint16))
    found = decoded(square(encoded(deep), size=2))
    assert found[..., 0].tolist() == [[0, 255], [128, 7]]


def test_cmyk_and_one_bit() -> None:
    cmyk = Pillow.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = decoded(square(encoded(cmyk, "JPEG", quality=100), size=8))[4, 4].astype(int)
    assert np.abs(red - (255, 0, 0)).max() <= 4
    assert decoded(square(encoded(Pillow.new("1", (2, 2), 1)), size=2)).min() == 255


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_every_format_is_read_and_the_same_bytes_give_the_same_square(kind: str) -> None:
    data = encoded(Pillow.new("RGB", (8, 8), (0, 128, 0)), kind)
    found = square(data, size=8)
    assert found == square(data, size=8)
    assert np.abs(decoded(found)[4, 4].astype(int) - (0, 128, 0)).max() <= 3


def header(width: int, height: int) -> bytes:
    """A PNG that only claims to be large."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b"")


TIFF = encoded(Pillow.new("RGB", (4, 4)), "TIFF")
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="4" height="4"><script>alert(1)</script></svg>'
WHOLE = encoded(Pillow.fromarray(noise(64, 64, 3)))


@pytest.mark.parametrize(
    "data",
    [b"", b"GIF89a", SVG, TIFF, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n", WHOLE[:2000],
     header(100_000, 1000), header(2**31 - 1, 2**31 - 1), header(0, 5), header(8, 8)],
    ids=["empty", "gif_head", "svg", "tiff", "eps", "truncated", "huge", "huger", "no_width", "no_pixels"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_cannot_be_read_safely_is_refused(data: bytes) -> None:
    with pytest.raises(BadImage, match=r"pixels|formats"):
        square(data, size=8)


def test_a_small_file_cannot_ask_for_a_huge_canvas() -> None:
    """One row of 60,000 pixels is a tiny file; the square around it would be 10 GB."""
    with pytest.raises(BadImage, match="narrow"):
        square(encoded(Pillow.new("L", (60_000, 1))), size=8)
    assert square(encoded(Pillow.new("L", (4_000, 10))), size=8)


def test_the_pixel_limit_is_exact() -> None:
    picture = encoded(Pillow.new("L", (30, 20)))
    assert square(picture, size=8, max_pixels=600)
    with pytest.raises(BadImage, match="30 x 20 pixels, more than 599"):
        square(picture, size=8, max_pixels=599)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_damaged_files_are_read_or_refused_and_nothing_else(kind: str) -> None:
    draw = random.Random(kind)
    exif = Pillow.Exif()
    exif[0x0112] = 6
    more: dict[str, Any] = {"exif": exif} if kind in ("PNG", "JPEG", "WEBP") else {}
    whole = encoded(Pillow.fromarray(noise(20, 24, 3)), kind, **more)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(400):
            data = bytearray(whole)
            for _ in range(draw.choice([1, 2, 8])):
                data[draw.randrange(draw.choice([60, len(data)]))] = draw.randrange(256)
            try:
                square(bytes(data[: draw.choice([len(data), draw.randrange(len(data))])]), size=8)
            except BadImage:
                continue


@pytest.mark.parametrize("mean", [(0.5, 0.5, 0.5), (0.48145466, 0.4578275, 0.40821073)])
def test_pixels_are_those_of_the_stock_processor(mean: tuple[float, ...], tiny: Path) -> None:
    std = (0.26862954, 0.26130258, 0.27577711)
    squares = [square(path.read_bytes(), size=28) for path in sorted((tiny / "pairs").glob("*.png"))[:8]]
    size = {"height": 28, "width": 28}
    stock = CLIPImageProcessorPil(size=size, do_center_crop=False, image_mean=list(mean), image_std=list(std))
    expected = stock([Pillow.open(io.BytesIO(data)) for data in squares], return_tensors="np")["pixel_values"]
    found = pixels(squares, mean=mean, std=std)
    assert found.dtype == np.float32
    assert found.shape == expected.shape == (8, 3, 28, 28)
    assert np.abs(found - expected).max() <= 1e-6
