"""Recognise images by their bytes, never by a name or a Content-Type."""

from typing import assert_never

from vila_ops.config.images import ImageReading
from vila_ops.data.containers import BadImage, strip
from vila_ops.data.download.outcome import Failure, Outcome
from vila_ops.data.images import rgb

EXTENSIONS = {
    "JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "AVIF": "avif",
}  # fmt: skip


def image_format(data: bytes, *, max_pixels: int) -> str:
    """The file extension of an image that has at most max_pixels and decodes completely (its first frame).

    Raises Failure (not_an_image, too_many_pixels, broken_image).
    """
    try:
        rgb(data, at_least=1, reading=ImageReading(max_pixels=max_pixels))
        return EXTENSIONS[strip(data).format]
    except BadImage as error:
        raise Failure(_outcome(error), str(error)) from error


def _outcome(error: BadImage) -> Outcome:
    match error.reason:
        case "empty" | "not_an_image" | "unsupported":
            return "not_an_image"
        case "too_many_pixels" | "too_narrow" | "too_many_bytes":
            return "too_many_pixels"
        case "truncated" | "corrupt" | "too_complex":
            return "broken_image"
        case _:
            assert_never(error.reason)
