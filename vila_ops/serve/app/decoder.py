"""A process that decodes images: `python -m vila_ops.serve.app.decoder SETTINGS_JSON`.

It writes that it is ready. Then it reads a length and so many bytes of an image, and writes a status, a length and so
many bytes: the encoded square, or why there is none. It ends with its standard input. Whatever an image does to it, the
server kills it and goes on.
"""

import resource
import struct
import sys
from math import isqrt

from vila_ops.config.base import Config
from vila_ops.config.images import ImageReading, Webp
from vila_ops.config.model import ImageFit
from vila_ops.config.serve import ImageFormat
from vila_ops.data.containers import BadImage, strip
from vila_ops.data.images import BYTES_PER_PIXEL, Fit, square

LENGTH = struct.Struct("!I")
ANSWER = struct.Struct("!cI")
READY, SQUARE, REFUSED = b"+", b"s", b"r"
MEMORY_BYTES = 1536 * 2**20
"""Address space of the process beside what the pixels take; its libraries alone map several hundred MiB."""


class DecoderSettings(Config):
    """Which images are read, and what becomes of them."""

    size: int
    """Side of the square in pixels."""
    fit: ImageFit
    mean: tuple[float, ...]
    """Of the tower's channels, in [0, 1]."""
    max_pixels: int
    formats: tuple[ImageFormat, ...]

    def squared(self, data: bytes) -> bytes:
        """One encoded image as an encoded square. Raises BadImage."""
        stripped = strip(data)
        if stripped.format not in self.formats:
            raise BadImage("unsupported", f"a {stripped.format}; send one of {', '.join(self.formats)}")
        reading = ImageReading(max_pixels=self.max_pixels, max_side=isqrt(2 * self.max_pixels))
        try:
            fit = Fit(self.fit, self.mean)
            return square(data, size=self.size, fit=fit, encoding=Webp(), reading=reading)
        except MemoryError:
            raise BadImage("too_complex", "an image that takes too much memory to decode") from None


def main() -> None:
    """Decode until the standard input ends."""
    settings = DecoderSettings.model_validate_json(sys.argv[1])
    limit = MEMORY_BYTES + BYTES_PER_PIXEL * settings.max_pixels
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    sink.write(ANSWER.pack(READY, 0))
    sink.flush()
    while len(head := source.read(LENGTH.size)) == LENGTH.size:
        data = source.read(*LENGTH.unpack(head))
        try:
            status, answer = SQUARE, settings.squared(data)
        except BadImage as error:
            status, answer = REFUSED, str(error).encode()
        sink.write(ANSWER.pack(status, len(answer)) + answer)
        sink.flush()


if __name__ == "__main__":
    main()
