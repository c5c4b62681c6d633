"""The HTTP routes of an endpoint: OpenAI's chat API. The same app runs under uvicorn and Ray Serve."""

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

from vila_ops.generate.engine import Engine
from vila_ops.generate.request import Output, Prompt
from vila_ops.serve.app.chat_prompt import build_prompt
from vila_ops.serve.app.engine_loop import EngineLoop
from vila_ops.serve.app.errors import ApiError
from vila_ops.serve.app.schema import ChatRequest, parse
from vila_ops.serve.spec import Spec

log = logging.getLogger(__name__)


def create_app(spec: Spec, engine: Engine, *, replica: dict[str, Any]) -> FastAPI:
    """The app of one replica; /health shows `replica`. The app closes the engine when it shuts down."""
    loop = EngineLoop(engine, timeout_seconds=spec.service.request_timeout_seconds)
    chat = _Chat(spec, engine, loop)
    started = int(time.time())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        loop.close()

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
    """Chat completions, from the bytes of a request to the body of its response."""

    def __init__(self, spec: Spec, engine: Engine, loop: EngineLoop) -> None:
        self.spec, self.engine, self.loop = spec, engine, loop

    async def complete(self, body: bytes) -> dict[str, Any]:
        """The body of the response. Raises ApiError for a request that is refused or times out."""
        request, prompt = await asyncio.to_thread(self._read, body)  # images take long to decode
        output = await self.loop.generate(prompt, max_new_tokens=self._max_new_tokens(request, prompt))
        return self._response(prompt, output)

    def _read(self, body: bytes) -> tuple[ChatRequest, Prompt]:
        request = parse(body)
        if request.model != self.spec.version.name:
            text = f"there is no model {request.model[:200]!r} here; this endpoint serves {self.spec.version.name!r}"
            raise ApiError(404, text, param="model", code="model_not_found")
        return request, build_prompt(request, self.spec.service, self.engine)

    def _max_new_tokens(self, request: ChatRequest, prompt: Prompt) -> int:
        """Most tokens of the answer. Raises ApiError 400 when prompt and answer exceed the context."""
        requested, limit = request.requested_tokens(), self.spec.service.max_new_tokens
        if requested is not None and requested > limit:
            name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
            text = f"{name}: {requested} is more than the {limit} tokens that this service generates"
            raise ApiError(400, text, param=name, code="invalid_value")
        context, length = self.engine.context_length, len(prompt.input_ids)
        left = context - length
        if left < (requested or 1):
            text = (
                f"this model's context is {context} tokens, but the messages have {length} tokens (images included) "
                f"and the answer may have {requested or 1}; shorten the messages or lower max_tokens"
            )
            raise ApiError(400, text, param="messages", code="context_length_exceeded")
        return requested or min(limit, left)

    def _response(self, prompt: Prompt, output: Output) -> dict[str, Any]:
        prompt_tokens, completion_tokens = len(prompt.input_ids), len(output.ids)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": self.engine.tokenizer.decode(output.ids), "refusal": None},
            "finish_reason": output.finish_reason,
            "logprobs": None,
        }
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.spec.version.name,
            "system_fingerprint": self.spec.version.checkpoint.digest,
            "choices": [choice],
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": completion_tokens,
                "total_tokens": prompt_tokens + completion_tokens,
            },
        }


async def _body(request: Request, *, max_bytes: int) -> bytes:
    """Read the body; no more than `max_bytes` of it are held. Raises ApiError 413 for a longer one."""
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
