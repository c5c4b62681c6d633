"""Encoded pictures to the squares that the tower sees. Pure: the same bytes give the same pixels everywhere."""

# I images, S side in pixels

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Decoded by content, never by file name; formats that can run programs (EPS, SVG, PDF) are not among them."""
MAX_PIXELS = 40_000_000


class BadImage(ValueError):
    """A picture that cannot be decoded safely."""


def square(data: bytes, *, size: int, max_pixels: int = MAX_PIXELS) -> bytes:
    """One encoded picture to a size x size RGB PNG: upright, transparent on white, padded with white, bicubic."""
    picture = _decode(data, max_pixels=max_pixels)
    side = max(picture.size)
    canvas = Pillow.new("RGB", (side, side), (255, 255, 255))
    canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    out = io.BytesIO()
    canvas.resize((size, size), Pillow.Resampling.BICUBIC).save(out, "PNG", compress_level=6)
    return out.getvalue()


def pixels(squares: list[bytes], *, mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.float32]:
    """PNG squares to normalised pixel values (I, 3, S, S): (x / 255 - mean) / std for each channel."""
    arrays = [np.asarray(Pillow.open(io.BytesIO(data), formats=("PNG",)).convert("RGB")) for data in squares]
    scaled = np.stack(arrays).astype(np.float32) / np.float32(255)
    normalised = (scaled - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return np.ascontiguousarray(normalised.transpose(0, 3, 1, 2))


def _decode(data: bytes, *, max_pixels: int) -> Pillow.Image:
    try:
        with Pillow.open(io.BytesIO(data), formats=FORMATS) as opened:
            if opened.width * opened.height > max_pixels:
                raise BadImage(f"{opened.width} x {opened.height} pixels, more than {max_pixels}")
            if max(opened.size) ** 2 > 2 * max_pixels:
                raise BadImage(f"{opened.width} x {opened.height} pixels: so narrow that its square would fill memory")
            upright = ImageOps.exif_transpose(opened)
            if upright.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip to white instead of scale
                upright = Pillow.fromarray((np.asarray(upright) >> 8).clip(0, 255).astype(np.uint8))
            if "transparency" in upright.info or upright.mode in ("RGBA", "LA", "PA"):
                rgba = upright.convert("RGBA")
                white = Pillow.new("RGBA", rgba.size, (255, 255, 255, 255))
                return Pillow.alpha_composite(white, rgba).convert("RGB")
            return upright.convert("RGB")
    except BadImage:
        raise
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Pillow.DecompressionBombError) as error:
        raise BadImage(f"not a readable picture of the formats {', '.join(FORMATS)}") from error
