"""How images are decoded and stored in prepared datasets."""

from typing import Annotated, Literal

from pydantic import Field

from vila_ops.config.base import Config

Decoding = Literal["exact", "scaled"]
"""exact: every pixel of the file is decoded. scaled: a JPEG much larger than the square is decoded at 1/2, 1/4 or 1/8
of its size, which is several times faster; data.images.SCALED_MARGIN states the error."""


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
