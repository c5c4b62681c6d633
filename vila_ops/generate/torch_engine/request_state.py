"""A request of the engine, and how far it is."""

import functools
import hashlib
import secrets
from dataclasses import dataclass, field

from torch import Tensor

from vila_ops.generate.request import Delta, FinishReason, Prompt, Sampling, TokenLogprob
from vila_ops.generate.torch_engine.grammar import AnswerGrammar


@dataclass(eq=False)
class GenerationRequest:
    """A prompt with its sampling settings."""

    prompt: Prompt
    sampling: Sampling
    grammar: AnswerGrammar | None = None
    """Of the answer, if the request has a JSON schema."""
    aborted: bool = False
    """Set by the engine, from another thread; the request then ends before the next step."""

    def __post_init__(self) -> None:
        self.seed = secrets.randbits(64) if self.sampling.seed is None else self.sampling.seed

    @functools.cached_property
    def image_digests(self) -> tuple[bytes, ...]:
        """SHA-256 of each encoded square. Its encoding is lossless and always the same, so it stands for the pixels."""
        return tuple(hashlib.sha256(image).digest() for image in self.prompt.images)

    def max_tokens(self) -> int:
        """Tokens of the prompt and of the longest answer."""
        return len(self.prompt.input_ids) + self.sampling.max_new_tokens


@dataclass(eq=False)
class RequestState:
    """A request in the scheduler."""

    number: int
    """The order of arrival."""
    request: GenerationRequest
    ids: list[int] = field(default_factory=list)
    """The answer so far."""
    features: list[Tensor] = field(default_factory=list)
    """Tower features (P, C) of the first images, while the prompt is read."""
    embeddings: Tensor | None = None
    """(T, D), of the tokens that are still to be read, from when the first of them are."""
    cached_tokens: int = 0
    """First tokens of the prompt that came from the prefix cache, until they are reported."""

    def tokens(self) -> list[int]:
        """Prompt and answer so far."""
        return [*self.request.prompt.input_ids, *self.ids]

    def append(self, token: int, logprob: TokenLogprob | None) -> Delta:
        """Take the next token."""
        sampling = self.request.sampling
        cached, self.cached_tokens = self.cached_tokens, 0
        if token in sampling.stop_ids:
            return Delta([], "stop", cached_tokens=cached)
        if self.request.grammar is not None:
            self.request.grammar.take(token)
        self.ids.append(token)
        reason: FinishReason | None = "length" if len(self.ids) == sampling.max_new_tokens else None
        return Delta([token], reason, () if logprob is None else (logprob,), cached)
