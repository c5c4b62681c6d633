"""Whether bytes are a picture: told by the bytes, never by a name or a Content-Type."""

import io
import struct

from PIL import Image as Pillow
from PIL import UnidentifiedImageError

from vila_ops.data.download.outcome import Failure
from vila_ops.data.images import FORMATS

EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}


def picture_format(data: bytes, *, max_pixels: int) -> str:
    """The file extension for a picture of at most max_pixels that decodes to its end (an animation: its first frame).

    Raises Failure (not_a_picture, too_many_pixels, broken_picture).
    """
    try:
        with Pillow.open(io.BytesIO(data), formats=FORMATS) as picture:
            if picture.width * picture.height > max_pixels:
                raise Failure("too_many_pixels", f"{picture.width} x {picture.height} pixels, more than {max_pixels}")
            picture.draft(None, (1, 1))  # a JPEG is then read whole, but to an eighth of its size
            picture.load()
            return EXTENSIONS[str(picture.format)]
    except UnidentifiedImageError as error:
        raise Failure("not_a_picture", f"the bytes are none of {', '.join(FORMATS)}") from error
    except Pillow.DecompressionBombError as error:
        raise Failure("too_many_pixels", f"more than {max_pixels} pixels") from error
    # What Pillow's readers raise for hostile bytes, besides what they say that they raise.
    except (OSError, EOFError, ValueError, SyntaxError, LookupError, TypeError, ArithmeticError, struct.error) as error:
        raise Failure("broken_picture", "begins as a picture and cannot be decoded to its end") from error
