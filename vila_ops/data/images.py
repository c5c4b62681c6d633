"""Encoded images to squares for the vision tower. Pure: the same bytes give the same pixels on every machine."""

import io
import math
from dataclasses import dataclass
from typing import Literal, assert_never

import numpy as np
from PIL import Image as Pillow
from PIL import features

from vila_ops.config.images import ImageEncoding, ImageReading, Jpeg, Webp
from vila_ops.config.model import ImageFit
from vila_ops.data.containers import BadImage, Reason, Stripped, strip

BYTES_PER_PIXEL = 16
"""Peak memory of `square` for one image, without the file (measured; WebP, rotated)."""
SCALED_MARGIN = 2
"""After a scaled decode the image is at least so many times as large as its part of the square, in both dimensions.

Squares then differ from those of an exact decode by at most 12 of 255 and by less than 1 on average: measured on photos
of 4000 x 3000 with detail down to the pixel, on noise of 1/f, 1/f^2 and white, for sizes of 224, 336 and 448."""
BAND_ROWS = 128
"""Rows that are converted to RGB at once."""
MOST_CROPPED = 64
"""Largest aspect ratio of an image that is cropped to its middle: the whole image is resized first."""
Colour = tuple[int, int, int]
WHITE: Colour = (255, 255, 255)
BICUBIC = Pillow.Resampling.BICUBIC
READING = ImageReading()
"""How images are read unless a mixture says otherwise."""
DAMAGE = (OSError, ValueError, SyntaxError, RuntimeError)
"""The errors that Pillow raised for 150,000 damaged files."""
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I;16", "I;16B", "I;16L", "I")
"""Pixels that become RGB here; the others of Pillow, such as 32-bit grey of a TIFF, have no range of their own."""
TURNS = {
    2: Pillow.Transpose.FLIP_LEFT_RIGHT,
    3: Pillow.Transpose.ROTATE_180,
    4: Pillow.Transpose.FLIP_TOP_BOTTOM,
    5: Pillow.Transpose.TRANSPOSE,
    6: Pillow.Transpose.ROTATE_270,
    7: Pillow.Transpose.TRANSVERSE,
    8: Pillow.Transpose.ROTATE_90,
}
"""The transposition that undoes each orientation (EXIF 2.3, tag 0x0112)."""


@dataclass(frozen=True)
class Fit:
    """How an image becomes a square: bit-exact with the Pillow image processors of transformers.

    These are LlavaImageProcessorPil with do_pad (pad), and CLIPImageProcessorPil with a size of two sides (resize) or
    of the shortest side (crop).
    """

    kind: ImageFit
    mean: tuple[float, ...]
    """Mean of the tower's channels, in [0, 1]: the padding colour."""

    @property
    def colour(self) -> Colour:
        """The padding colour in 0 .. 255, rounded down as in LLaVA."""
        red, green, blue = (int(value * 255) for value in self.mean)
        return red, green, blue


def square(
    data: bytes,
    *,
    size: int,
    fit: Fit,
    encoding: ImageEncoding,
    reading: ImageReading = READING,
) -> bytes:
    """One encoded image as an encoded size x size RGB square: upright, transparency on white, bicubic.

    The first frame of an animation is used. Raises BadImage.
    """
    stripped = _checked(data, reading)
    factor = _factor(stripped, size=size, fit=fit) if reading.decode == "scaled" else 1
    decoded, whole = _decode(stripped, reading, factor=factor), upright_size(stripped)
    return _encode(_fit(decoded, whole, size=size, fit=fit, factor=factor), encoding)


def rgb(data: bytes, *, at_least: int, reading: ImageReading = READING) -> Pillow.Image:
    """One encoded image as RGB: upright, transparency on white. Raises BadImage.

    A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, with sides of `at_least` pixels or more, which is faster.
    """
    stripped = _checked(data, reading)
    sides = (stripped.width, stripped.height)
    most = min(sides) // at_least if stripped.format == "JPEG" and min(sides) >= 64 else 1
    factor = next((factor for factor in (8, 4, 2) if factor <= most), 1)
    return _rgb(_decode(stripped, reading, factor=factor))


def upright_size(stripped: Stripped) -> tuple[int, int]:
    """Width and height in pixels of the upright image."""
    sides = (stripped.width, stripped.height)
    return sides[::-1] if stripped.orientation >= 5 else sides


def suffix(encoding: ImageEncoding) -> Literal["jpg", "webp"]:
    """The file name extension of the encoding."""
    match encoding:
        case Jpeg():
            return "jpg"
        case Webp():
            return "webp"
        case _:
            assert_never(encoding)


def _checked(data: bytes, reading: ImageReading) -> Stripped:
    """The stripped image. Raises BadImage if decoding it would take too much memory or time."""
    stripped = strip(data)
    sides, limits = (stripped.width, stripped.height), (reading.max_pixels, reading.max_side)
    size, way = f"{sides[0]} x {sides[1]} pixels", "scale it down, or raise the limit"
    if sides[0] * sides[1] > limits[0]:
        raise BadImage("too_many_pixels", f"{size}, more than {limits[0]} (max_pixels); {way}")
    if max(sides) > limits[1]:
        raise BadImage("too_narrow", f"{size}, so narrow that a side has more than {limits[1]} (max_side); {way}")
    return stripped


def _factor(stripped: Stripped, *, size: int, fit: Fit) -> int:
    """The factor by which the decoder shrinks both sides: 8, 4, 2 or 1. It divides both sides."""
    sides = (stripped.width, stripped.height)
    if stripped.format != "JPEG" or min(sides) < 64:  # below 8 x 8 pixels `draft` rounds the factor
        return 1
    becomes_size = max(sides) if fit.kind == "pad" else min(sides)
    most = max(1, becomes_size // (SCALED_MARGIN * size))
    return next(factor for factor in (8, 4, 2, 1) if factor <= most and not any(side % factor for side in sides))


def _decode(stripped: Stripped, reading: ImageReading, *, factor: int) -> Pillow.Image:
    """The upright image, with both sides divided by the factor."""
    try:
        return _decoded(stripped, stripped.data, factor=factor)
    except BadImage as error:
        if error.reason != "truncated" or stripped.format != "JPEG" or reading.truncated == "drop":
            raise
    return _decoded(stripped, stripped.with_end(), factor=factor)


def _decoded(stripped: Stripped, data: bytes, *, factor: int) -> Pillow.Image:
    """The upright image of `data`, which has the header of the stripped file."""
    if stripped.format == "AVIF" and not features.check("avif"):
        raise BadImage("unsupported", "an AVIF, which this build of Pillow does not read; save it as JPEG or PNG")
    try:
        with Pillow.open(io.BytesIO(data), formats=(stripped.format,)) as image:
            if image.size != (stripped.width, stripped.height):
                raise ValueError("the decoder reads another size than the header states")
            if image.mode not in MODES or (stripped.format == "TIFF" and image.mode == "I"):
                text = f"a {stripped.format} of pixels {image.mode!r}; save it as 8-bit RGB"
                raise BadImage("unsupported", text)
            if factor > 1:
                image.draft(None, (stripped.width // factor, stripped.height // factor))
            image.load()
            turn = TURNS.get(stripped.orientation)
            return image if turn is None else image.transpose(turn)
    except BadImage:
        raise
    except DAMAGE as error:
        reason: Reason = "truncated" if "truncated" in str(error).lower() else "corrupt"
        raise BadImage(reason, f"a {stripped.format} that is {reason}") from error


def _fit(image: Pillow.Image, whole: tuple[int, int], *, size: int, fit: Fit, factor: int) -> Pillow.Image:
    """A decoded image as a square; `whole` is its width and height in pixels before division by the factor."""
    match fit.kind:
        case "pad":
            return _pad_and_resize(image, whole, size=size, factor=factor, colour=fit.colour)
        case "resize":
            return _whole_rgb(image).resize((size, size), BICUBIC)
        case "crop":
            if max(whole) > MOST_CROPPED * min(whole):
                text = f"{whole[0]} x {whole[1]} pixels: so narrow that its middle shows next to nothing"
                raise BadImage("too_narrow", text)
            width, height = (int(size * side / min(whole)) for side in whole)
            left, top = (width - size) // 2, (height - size) // 2
            resized = _whole_rgb(image).resize((width, height), BICUBIC)
            return resized.crop((left, top, left + size, top + size))
        case _:
            assert_never(fit.kind)


def _pad_and_resize(
    image: Pillow.Image, whole: tuple[int, int], *, size: int, factor: int, colour: Colour
) -> Pillow.Image:
    """The resized padded image, bit-exact with Pillow on the whole padded image.

    Pillow resizes rows first, then columns, and rounds in between. So the rows of padding, which keep their colour,
    need not be resized, and the others can be resized in bands.
    """
    side = max(whole)
    across, down = _pad(whole[0], side, factor=factor), _pad(whole[1], side, factor=factor)
    column = Pillow.new("RGB", (size, down.length), colour)
    is_ready = _is_rgb(image) and image.width == across.length
    step = image.height if is_ready else BAND_ROWS
    for top in range(0, image.height, step):
        rows = image
        if not is_ready:
            cut = _rgb(image.crop((0, top, image.width, min(top + step, image.height))))
            rows = Pillow.new("RGB", (across.length, cut.height), colour)
            rows.paste(cut, (across.before, 0))
        box = (across.start, 0, across.stop, rows.height)
        column.paste(rows.resize((size, rows.height), BICUBIC, box=box), (0, down.before + top))
    return column.resize((size, size), BICUBIC, box=(0, down.start, size, down.stop))


@dataclass(frozen=True)
class _Pad:
    """One dimension of the padded image, in decoded pixels: length, start of the image, and the range to resize."""

    length: int
    before: int
    start: float
    stop: float


def _pad(length: int, side: int, *, factor: int) -> _Pad:
    """Half of the padding, rounded down, comes first; with a factor it may be a fraction of a decoded pixel."""
    first = (side - length) // 2 / factor
    before = math.ceil(first)
    stop = before - first + side / factor
    return _Pad(length=math.ceil(stop), before=before, start=before - first, stop=stop)


def _whole_rgb(image: Pillow.Image) -> Pillow.Image:
    """_rgb in bands, which bounds the memory for intermediate images."""
    if _is_rgb(image):
        return image
    whole = Pillow.new("RGB", image.size)
    for top in range(0, image.height, BAND_ROWS):
        whole.paste(_rgb(image.crop((0, top, image.width, min(top + BAND_ROWS, image.height)))), (0, top))
    return whole


def _is_rgb(image: Pillow.Image) -> bool:
    return image.mode == "RGB" and "transparency" not in image.info


def _rgb(image: Pillow.Image) -> Pillow.Image:
    """The image as RGB with eight bits per channel, transparency on white."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip to white instead of scaling
        image = Pillow.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        rgba = image.convert("RGBA")
        white = Pillow.new("RGBA", rgba.size, (*WHITE, 255))
        return Pillow.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _encode(image: Pillow.Image, encoding: ImageEncoding) -> bytes:
    out = io.BytesIO()
    match encoding:
        case Jpeg(quality=quality):
            image.save(out, "JPEG", quality=quality, subsampling=0)
        case Webp(quality=None):
            # A fifth of the time of PNG at level 6, and smaller for photos. Method 1 takes four times as long for 4 %
            # (photos) to 40 % (drawings) fewer bytes.
            image.save(out, "WEBP", lossless=True, quality=0, method=0)
        case Webp(quality=quality):
            image.save(out, "WEBP", quality=quality, method=2)  # 4 takes twice as long for 1 % fewer bytes
        case _:
            assert_never(encoding)
    return out.getvalue()
