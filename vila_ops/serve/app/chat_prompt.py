"""The messages of a request to the prompt that the engine reads."""

import base64
import binascii
import re
from math import isqrt

from vila_ops.config import Service
from vila_ops.config.images import ImageReading, Webp
from vila_ops.data.containers import BadImage
from vila_ops.data.images import square
from vila_ops.data.records import Image
from vila_ops.generate.engine import Engine
from vila_ops.generate.request import Prompt
from vila_ops.serve.app.errors import ApiError
from vila_ops.serve.app.schema import ChatRequest, ImagePart, Message

DATA_URL = re.compile(r"data:[\w.+-]+/[\w.+-]+;base64,", re.ASCII | re.IGNORECASE)


def build_prompt(request: ChatRequest, service: Service, engine: Engine) -> Prompt:
    """Decode the images, tokenise the text and expand the image placeholders.

    Raises ApiError 400 that names the message and the part.
    """
    count = sum(isinstance(part, ImagePart) for message in request.messages for part in message.content)
    if count > service.max_images:
        text = f"{count} images, more than the {service.max_images} that one request may have"
        raise ApiError(400, text, param="messages", code="too_many_images")
    turns: list[tuple[str, tuple[str | Image, ...]]] = []
    for number, message in enumerate(request.messages):
        parts = _parts(message, f"messages[{number}]", engine, max_pixels=service.max_image_pixels)
        turns.append(("system" if message.role == "developer" else message.role, parts))
    images = tuple(part.data for _, parts in turns for part in parts if isinstance(part, Image))
    return Prompt(input_ids=engine.tokenizer.prompt(turns), images=images)


def _parts(message: Message, where: str, engine: Engine, *, max_pixels: int) -> tuple[str | Image, ...]:
    size, fit = engine.image_size, engine.image_aspect_ratio
    reading = ImageReading(max_pixels=max_pixels, max_side=isqrt(2 * max_pixels))  # whose square is of twice the pixels
    parts: list[str | Image] = []
    for number, part in enumerate(message.content):
        if not isinstance(part, ImagePart):
            parts.append(part.text)
            continue
        param = f"{where}.content[{number}].image_url.url"
        if message.role != "user":
            raise ApiError(400, f"{param}: only a user's message may have images", param=param, code="invalid_value")
        data = _bytes(part.image_url.url, param)
        try:
            parts.append(Image(square(data, size=size, fit=fit, encoding=Webp(), reading=reading)))
        except BadImage as error:
            raise ApiError(400, f"{param}: {error}", param=param, code="invalid_image") from None
    return tuple(parts)


def _bytes(url: str, param: str) -> bytes:
    start = DATA_URL.match(url)
    if start is None:
        text = f"{param}: images are read from base64 data: URLs (data:image/png;base64,...) only; nothing is fetched"
        raise ApiError(400, text, param=param, code="unsupported_image_url")
    try:
        return base64.b64decode(url[start.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, f"{param}: not valid base64", param=param, code="invalid_image") from None
