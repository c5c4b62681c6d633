"""One answer: from a prompt in the engine to the body of a chat completion, or to the chunks of a stream."""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from vila_ops.generate.engine import Engine
from vila_ops.generate.request import Prompt, Sampling
from vila_ops.serve.app.engine_loop import Generation
from vila_ops.serve.app.metrics import Metrics, TokenClock
from vila_ops.serve.app.samples import response_id
from vila_ops.serve.app.schema import ChatRequest
from vila_ops.serve.app.text_stream import AnswerText, TextPiece, logprob_content

Json = dict[str, Any]


@dataclass
class Answer:
    """The choices of one request. It is generated once, by `completion` or `chunks`."""

    request: ChatRequest
    prompt: Prompt
    samplings: Sequence[Sampling]
    engine: Engine
    metrics: Metrics
    fingerprint: str
    """Digest of the model."""
    timeout_seconds: float
    tokens: int = field(default=0, init=False)
    """Generated so far, of all choices."""
    cached_tokens: int = field(default=0, init=False)
    """Tokens of the prompt that the engine did not read again, for the first choice."""
    text: str = field(default="", init=False)
    """Of the first choice so far."""
    complete: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.id, self.created = response_id(self.fingerprint), int(time.time())

    async def completion(self) -> Json:
        """The body of a response. Raises ApiError."""
        received: list[list[TextPiece]] = [[] for _ in self.samplings]
        async with aclosing(self._pieces()) as pieces:
            async for piece in pieces:
                received[piece.choice].append(piece)
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": "".join(piece.text for piece in one), "refusal": None},
                "finish_reason": one[-1].finish_reason,
                "logprobs": self._logprobs(one),
            }
            for index, one in enumerate(received)
        ]
        return self._body("chat.completion", choices) | {"usage": self.usage()}

    async def chunks(self) -> AsyncGenerator[Json, None]:
        """The chunks of a stream. Raises ApiError, also after the first chunks."""
        options = self.request.stream_options
        with_usage = bool(options and options.include_usage)
        more: Json = {"usage": None} if with_usage else {}
        for index in range(len(self.samplings)):
            yield self._chunk(index, {"role": "assistant", "content": ""}) | more
        waiting: list[list[TextPiece]] = [[] for _ in self.samplings]
        async with aclosing(self._pieces()) as pieces:
            async for piece in pieces:
                held = waiting[piece.choice]
                held.append(piece)
                if piece.text:
                    yield self._chunk(piece.choice, {"content": piece.text}, self._logprobs(held)) | more
                    held.clear()
                if piece.finish_reason is not None:
                    logprobs = self._logprobs(held) if held else None
                    yield self._chunk(piece.choice, {}, logprobs, finish_reason=piece.finish_reason) | more
        if with_usage:
            yield self._body("chat.completion.chunk", []) | {"usage": self.usage()}

    def usage(self) -> Json:
        """Numbers of tokens."""
        length = len(self.prompt.input_ids)
        images = self.prompt.input_ids.count(self.engine.tokenizer.image_id)
        return {
            "prompt_tokens": length,
            "completion_tokens": self.tokens,
            "total_tokens": length + self.tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens, "image_tokens": images},
        }

    async def _pieces(self) -> AsyncGenerator[TextPiece, None]:
        """The pieces of all choices as they come."""
        self.metrics.prompt_tokens.inc(len(self.prompt.input_ids))
        self.metrics.request_prompt_tokens.observe(len(self.prompt.input_ids))
        clock = TokenClock(self.metrics)
        stops = self.request.stop or []
        texts = [AnswerText(self.engine.tokenizer, index, stops=stops) for index in range(len(self.samplings))]
        async with Generation(
            self.engine, self.prompt, self.samplings, timeout_seconds=self.timeout_seconds
        ) as generation:
            async for index, delta in generation.deltas():
                piece = texts[index].add(delta)
                if index == 0:
                    self.cached_tokens += delta.cached_tokens
                    self.text += piece.text
                self.tokens += piece.tokens
                self.metrics.generation_tokens.inc(piece.tokens)
                if piece.tokens:
                    clock.token(index)
                if piece.finish_reason is not None:
                    generation.end(index)
                    self.metrics.finished(piece.finish_reason)
                yield piece
        clock.ended()
        self.complete = True

    def _body(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.request.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }

    def _chunk(
        self, index: int, delta: Json, logprobs: Json | None = None, *, finish_reason: str | None = None
    ) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._body("chat.completion.chunk", [choice])

    def _logprobs(self, pieces: Sequence[TextPiece]) -> Json | None:
        if not self.request.logprobs:
            return None
        tokens = [one for piece in pieces for one in piece.logprobs]
        return {"content": logprob_content(self.engine.tokenizer, tokens), "refusal": None}
