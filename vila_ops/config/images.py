"""How images are read, decoded and stored in prepared datasets."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from vila_ops.config.base import Config

Decoding = Literal["exact", "scaled"]
"""exact: every pixel of the file is decoded. scaled: a JPEG much larger than the square is decoded at 1/2, 1/4 or 1/8
of its size, which is several times faster; data.images.SCALED_MARGIN states the error."""


class ImageReading(Config):
    """How image files are read, and the largest that are."""

    decode: Decoding = "exact"
    max_pixels: PositiveInt = 2**26
    """Largest width x height. Decoding takes up to 16 bytes a pixel, so 1 GiB in each worker for an image of the
    default size, which admits photos of 64 megapixels."""
    max_side: PositiveInt = 2**14
    """Longest side in pixels. Padding an image to a square takes time for side x side pixels, a second or two at the
    default, which admits screenshots of long pages."""
    truncated: Literal["drop", "read"] = "drop"
    """What to do with a JPEG whose end is missing: drop its record (bad_image_truncated), or read it as VILA does, with
    grey for what is missing, and count it (truncated_image)."""


class Jpeg(Config):
    """JPEG without chroma subsampling: half the bytes of lossless WebP and an eighth of its time."""

    kind: Literal["jpeg"] = "jpeg"
    quality: int = Field(default=95, ge=1, le=100)


class Webp(Config):
    """WebP, lossless unless a quality is given."""

    kind: Literal["webp"] = "webp"
    quality: int | None = Field(default=None, ge=0, le=100)
    """None: lossless, so that the vision tower gets exactly the decoded pixels."""


ImageEncoding = Annotated[Jpeg | Webp, Field(discriminator="kind")]


class ImageStorage(ImageReading):
    """How images are read, and stored in shards: as squares of the model's input size."""

    encoding: ImageEncoding = Webp()
