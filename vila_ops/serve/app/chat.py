"""Chat completions: from a request to its response, within the limits of the service, the replica and the key."""

import asyncio
import hashlib
import hmac
import secrets
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from vila_ops.generate.engine import Engine
from vila_ops.generate.json_grammar import grammar_of
from vila_ops.generate.request import Prompt, Sampling
from vila_ops.serve.app.admission import Admission, Ticket, Uploads
from vila_ops.serve.app.answer import Answer
from vila_ops.serve.app.chat_prompt import PromptBuilder
from vila_ops.serve.app.errors import ApiError
from vila_ops.serve.app.guard import Caller
from vila_ops.serve.app.media import Media
from vila_ops.serve.app.metrics import Metrics
from vila_ops.serve.app.samples import SampleStore
from vila_ops.serve.app.schema import ChatRequest, parse
from vila_ops.serve.app.stream import EventStream, disconnected, unless_gone
from vila_ops.serve.app.threads import in_thread_if_long
from vila_ops.serve.spec import Spec


class Chat:
    """Answers chat requests. For one event loop."""

    def __init__(
        self, spec: Spec, engine: Engine, media: Media, metrics: Metrics, admission: Admission,
        samples: SampleStore | None,
    ) -> None:  # fmt: skip
        self._admission, self._samples = admission, samples
        self._spec, self._engine, self._metrics = spec, engine, metrics
        service = spec.service
        self._uploads = Uploads(spec.capacity.limits, metrics, max_body_bytes=service.max_body_bytes)
        self._prompts = PromptBuilder(service, engine, media, metrics)
        self._salt = secrets.token_bytes(32)

    async def respond(self, request: Request, caller: Caller) -> Response:
        """The response. Raises ApiError for a request that is refused or times out, and ClientGone."""
        body = await self._uploads.read(request)
        chat = await in_thread_if_long(len(body), self._read, body)
        ticket = self._admission.admit(caller.key, answers=chat.n or 1)
        try:
            answer = await unless_gone(disconnected(request.receive), self._prepare(chat, caller, ticket))
            headers = self._admission.headers(caller.key)
            if chat.stream:
                return EventStream(
                    answer.chunks(), headers=headers, on_end=lambda: self._settle(ticket, answer, caller)
                )
            completion = await unless_gone(disconnected(request.receive), answer.completion())
        except BaseException:
            ticket.close()
            raise
        self._settle(ticket, answer, caller)
        return JSONResponse(completion, headers=headers)

    def _read(self, body: bytes) -> ChatRequest:
        chat, most = parse(body), self._spec.capacity.limits.max_choices
        if chat.model != self._spec.version.name:
            raise model_not_found(chat.model, self._spec)
        if (chat.n or 1) > most:
            text = f"n: {chat.n} is more than the {most} answers that this endpoint gives to one request"
            raise ApiError(400, text, param="n", code="invalid_value")
        known = len(self._engine.tokenizer.fast)
        if wrong := next((token for token in chat.logit_bias or {} if int(token) >= known), None):
            text = f"logit_bias: there is no token {wrong}; the vocabulary has {known}"
            raise ApiError(400, text, param="logit_bias", code="invalid_value")
        return chat

    async def _prepare(self, chat: ChatRequest, caller: Caller, ticket: Ticket) -> Answer:
        seconds = self._spec.service.request_timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                if chat.response_format is not None:
                    await asyncio.to_thread(_check_grammar, chat)
                prompt = await self._prompts.build(chat, cache_salt=self._salt_of(caller))
        except TimeoutError:
            text = f"the request was not read within {seconds:g} seconds; try again, or send fewer images"
            raise ApiError(504, text, code="timeout") from None
        most = self._max_new_tokens(chat, prompt)
        ticket.charge(len(prompt.input_ids) + most * ticket.answers)
        return Answer(
            request=chat,
            prompt=prompt,
            samplings=self._samplings(chat, max_new_tokens=most),
            engine=self._engine,
            metrics=self._metrics,
            fingerprint=self._spec.version.checkpoint.digest,
            timeout_seconds=seconds,
        )

    def _settle(self, ticket: Ticket, answer: Answer, caller: Caller) -> None:
        """Give back what an answer did not use, and note what it used."""
        usage = answer.usage()
        ticket.close(used=usage["total_tokens"])
        caller.facts |= {
            "completion": answer.id,
            "images": len(answer.prompt.images),
            "prompt_tokens": usage["prompt_tokens"],
            "completion_tokens": usage["completion_tokens"],
        }
        if self._samples is not None and answer.complete and answer.request.store is None and self._samples.drawn():
            messages = [one.model_dump(mode="json") for one in answer.request.messages]
            self._samples.keep(answer.id, messages, answer=answer.text)

    def _salt_of(self, caller: Caller) -> str:
        """What keeps the cached work for one key from the others, whose time to first token would tell of it."""
        if caller.key is None:
            return ""
        return hmac.new(self._salt, caller.key.id.encode(), hashlib.sha256).hexdigest()

    def _max_new_tokens(self, request: ChatRequest, prompt: Prompt) -> int:
        """Most tokens of each answer. Raises ApiError 400 when prompt and answer exceed the context."""
        requested, limit = request.requested_tokens(), self._spec.service.max_new_tokens
        if requested is not None and requested > limit:
            name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
            text = f"{name}: {requested} is more than the {limit} tokens that this service generates"
            raise ApiError(400, text, param=name, code="invalid_value")
        context, length = self._engine.context_length, len(prompt.input_ids)
        left = context - length
        if left < (requested or 1):
            text = (
                f"this model's context is {context} tokens, but the messages have {length} tokens (images included) "
                f"and the answer may have {requested or 1}; shorten the messages or lower max_tokens"
            )
            raise ApiError(400, text, param="messages", code="context_length_exceeded")
        return requested or min(limit, left)

    def _samplings(self, chat: ChatRequest, *, max_new_tokens: int) -> list[Sampling]:
        """The settings of each choice; what a request leaves out has the engine's default."""
        stated: dict[str, Any] = {
            "temperature": chat.temperature,
            "top_p": chat.top_p,
            "top_k": chat.top_k and max(0, chat.top_k),
            "min_p": chat.min_p,
            "presence_penalty": chat.presence_penalty,
            "frequency_penalty": chat.frequency_penalty,
            "repetition_penalty": chat.repetition_penalty,
            "seed": chat.seed,
            "logprobs": (chat.top_logprobs or 0) if chat.logprobs else None,
            "json_schema": chat.json_schema(),
            "logit_bias": {int(token): bias for token, bias in (chat.logit_bias or {}).items()},
        }
        settings = {name: value for name, value in stated.items() if value is not None}
        stop_ids = self._engine.tokenizer.stop_ids
        return [Sampling(max_new_tokens, stop_ids, choice=number, **settings) for number in range(chat.n or 1)]


def _check_grammar(chat: ChatRequest) -> None:
    try:
        if (schema := chat.json_schema()) is not None:
            grammar_of(schema)
    except ValueError as error:
        raise ApiError(400, f"response_format: {error}", param="response_format", code="invalid_value") from None


def model_not_found(name: str, spec: Spec) -> ApiError:
    """The error for a model that is not served here."""
    text = f"there is no model {name[:200]!r} here; this endpoint serves {spec.version.name!r}"
    return ApiError(404, text, param="model", code="model_not_found")
