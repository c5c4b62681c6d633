"""The messages of a request to the prompt that the engine reads."""

import asyncio
import time

from vila_ops.config import Service
from vila_ops.data.records import Image
from vila_ops.data.text.conversation import BadText
from vila_ops.generate.engine import Engine
from vila_ops.generate.request import Prompt
from vila_ops.serve.app.errors import ApiError
from vila_ops.serve.app.media import Media
from vila_ops.serve.app.metrics import Metrics
from vila_ops.serve.app.schema import ChatMessage, ChatRequest, ImagePart
from vila_ops.serve.app.threads import in_thread_if_long

Turns = list[tuple[str, tuple[str | Image, ...]]]


class PromptBuilder:
    """Decodes the images of requests, tokenises the text and expands the image placeholders."""

    def __init__(self, service: Service, engine: Engine, media: Media, metrics: Metrics) -> None:
        self._service, self._engine, self._media, self._metrics = service, engine, media, metrics

    async def build(self, request: ChatRequest, *, cache_salt: str) -> Prompt:
        """The prompt. Raises ApiError 400 that names the message and the part."""
        self._check(request)
        turns: Turns = []
        for number, message in enumerate(request.messages):
            role = "system" if message.role == "developer" else message.role
            turns.append((role, await self._parts(message, f"messages[{number}]")))
        images = tuple(part.data for _, parts in turns for part in parts if isinstance(part, Image))
        characters = sum(len(part) for _, parts in turns for part in parts if isinstance(part, str))
        input_ids = await in_thread_if_long(characters, self._tokenised, turns)
        return Prompt(input_ids=input_ids, images=images, cache_salt=cache_salt)

    def _check(self, request: ChatRequest) -> None:
        """Refuse what can be refused before any work is done for it."""
        parts = [part for message in request.messages for part in message.content]
        count = sum(isinstance(part, ImagePart) for part in parts)
        if count > self._service.max_images:
            text = f"{count} images, more than the {self._service.max_images} that one request may have"
            raise ApiError(400, text, param="messages", code="too_many_images")
        for index, message in enumerate(request.messages):
            number = next((at for at, part in enumerate(message.content) if isinstance(part, ImagePart)), None)
            if number is not None and message.role != "user":
                param = f"messages[{index}].content[{number}].image_url.url"
                text = f"{param}: only a user's message may have images"
                raise ApiError(400, text, param=param, code="invalid_value")
        context = self._engine.context_length
        characters = sum(len(part.text) for part in parts if not isinstance(part, ImagePart))
        if characters > context * self._engine.tokenizer.longest or len(parts) > context:
            text = f"this model's context is {context} tokens, which the messages exceed many times; shorten them"
            raise ApiError(400, text, param="messages", code="context_length_exceeded")

    async def _parts(self, message: ChatMessage, where: str) -> tuple[str | Image, ...]:
        urls = {
            number: part.image_url.url for number, part in enumerate(message.content) if isinstance(part, ImagePart)
        }
        images = await self._images(urls, where)
        return tuple(
            images[number] if isinstance(part, ImagePart) else part.text for number, part in enumerate(message.content)
        )

    async def _images(self, urls: dict[int, str], where: str) -> dict[int, Image]:
        """Images by the number of their part; the first error ends the others and is raised."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = {
                    number: group.create_task(self._image(url, f"{where}.content[{number}].image_url.url"))
                    for number, url in urls.items()
                }
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return {number: task.result() for number, task in tasks.items()}

    async def _image(self, url: str, param: str) -> Image:
        started = time.monotonic()
        image = Image(await self._media.square(url, param=param))
        self._metrics.decode.observe(time.monotonic() - started)
        return image

    def _tokenised(self, turns: Turns) -> list[int]:
        try:
            return self._engine.tokenizer.prompt(turns)
        except BadText:
            text = "messages: a text has half of a surrogate pair, which is no character"
            raise ApiError(400, text, param="messages", code="invalid_value") from None
        except ValueError as error:
            text = f"messages: this model's chat template does not take them: {str(error)[:200]}"
            raise ApiError(400, text, param="messages", code="invalid_value") from None
