"""The HTTP side of an endpoint: OpenAI's chat API over a generator. The same app runs under uvicorn and Ray Serve."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from vila_ops.generate.engine import Answer, Generator, Prompt
from vila_ops.serve.app.chat_prompt import build_prompt
from vila_ops.serve.app.engine_loop import Batcher
from vila_ops.serve.app.errors import ApiError
from vila_ops.serve.app.schema import ChatRequest, parse
from vila_ops.serve.spec import Spec

log = logging.getLogger(__name__)


def create_app(spec: Spec, generator: Generator, *, replica: dict[str, Any]) -> FastAPI:
    """The app of one replica; `replica` is what it says of itself under /health."""
    batcher = Batcher(generator, max_batch=spec.capacity.max_batch)
    chat = _Chat(spec, generator, batcher)
    started = int(time.time())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        batcher.close()

    app = FastAPI(title=spec.service.name, lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _internal_error)

    @app.post("/v1/chat/completions")
    async def completions(request: Request) -> dict[str, Any]:
        return await chat.complete(await _body(request, max_bytes=spec.service.max_body_bytes))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_card(spec, started)]}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": spec.version.checkpoint.digest, "replica": replica}

    return app


class _Chat:
    """One chat completion, from the bytes of the request to the body of the response."""

    def __init__(self, spec: Spec, generator: Generator, batcher: Batcher) -> None:
        self.spec, self.generator, self.batcher = spec, generator, batcher

    async def complete(self, body: bytes) -> dict[str, Any]:
        """Raises ApiError for a request that cannot be answered."""
        request, prompt = await asyncio.to_thread(self._read, body)  # images take long to decode
        max_new_tokens = self._bound(request, prompt)
        seconds = self.spec.service.request_timeout_seconds
        try:
            answer = await asyncio.wait_for(self.batcher.answer(prompt, max_new_tokens=max_new_tokens), seconds)
        except TimeoutError:
            text = f"there was no answer within {seconds:g} seconds; try again, or ask for fewer tokens"
            raise ApiError(504, text, code="timeout", kind="server_error") from None
        return self._response(prompt, answer)

    def _read(self, body: bytes) -> tuple[ChatRequest, Prompt]:
        request = parse(body)
        if request.model != self.spec.version.name:
            text = f"there is no model {request.model[:200]!r} here; this endpoint serves {self.spec.version.name!r}"
            raise ApiError(404, text, param="model", code="model_not_found")
        return request, build_prompt(request, self.spec.service, self.generator)

    def _bound(self, request: ChatRequest, prompt: Prompt) -> int:
        """Tokens that the answer may have; raises ApiError 400 when prompt and answer do not fit."""
        asked, limit = request.asked_tokens(), self.spec.service.max_new_tokens
        if asked is not None and asked > limit:
            name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
            text = f"{name}: {asked} is more than the {limit} tokens that this service answers with"
            raise ApiError(400, text, param=name, code="invalid_value")
        context, length = self.generator.max_tokens, len(prompt.input_ids)
        room = context - length
        if room < (asked or 1):
            text = (
                f"this model's context is {context} tokens, but the messages have {length} tokens (images included) "
                f"and the answer may have {asked or 1}; shorten the messages or lower max_tokens"
            )
            raise ApiError(400, text, param="messages", code="context_length_exceeded")
        return asked or min(limit, room)

    def _response(self, prompt: Prompt, answer: Answer) -> dict[str, Any]:
        text = self.generator.tokenizer.decode(answer.ids)
        asked, said = len(prompt.input_ids), len(answer.ids)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "finish_reason": "stop" if answer.finished else "length",
            "logprobs": None,
        }
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.spec.version.name,
            "system_fingerprint": self.spec.version.checkpoint.digest,
            "choices": [choice],
            "usage": {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said},
        }


async def _body(request: Request, *, max_bytes: int) -> bytes:
    """The body, of which no more than the limit is ever held."""
    text = f"the body has more than {max_bytes} bytes; send fewer or smaller images"
    too_large = ApiError(413, text, code="request_too_large")
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and int(stated) > max_bytes:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)


def _model_card(spec: Spec, started: int) -> dict[str, Any]:
    version = spec.version
    return {
        "id": version.name,
        "object": "model",
        "created": started,
        "owned_by": "vila-ops",
        "version": version.version,
        "digest": version.checkpoint.digest,
        "identity": spec.identity(),
    }


async def _api_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), status_code=error.status)


async def _http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    body = ApiError(error.status_code, str(error.detail)).body()
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


async def _internal_error(request: Request, error: Exception) -> JSONResponse:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    text = "the server failed to answer this request; the reason is in its log"
    return JSONResponse(ApiError(500, text, code="internal_error", kind="server_error").body(), status_code=500)
