"""What an engine reads and returns: prompts, sampling settings, outputs and likelihoods. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "abort"]
"""stop: the model ended its answer with a stop token. length: the answer has max_new_tokens tokens. abort: the request
was aborted."""


@dataclass(frozen=True)
class Prompt:
    """What the model reads before it generates."""

    input_ids: list[int]
    """Each image is `Tokenizer.image_tokens` copies of the image token."""
    images: tuple[bytes, ...] = ()
    """Encoded squares with the side and aspect ratio rule of the engine, in the order of their placeholders."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedily, up to a stop token or a number of tokens."""

    max_new_tokens: int
    stop_ids: frozenset[int]


@dataclass(frozen=True)
class Delta:
    """The next tokens of a stream; the last delta of a stream has the finish reason."""

    ids: list[int]
    """Without the stop token."""
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Output:
    """All tokens that were generated for a prompt."""

    ids: list[int]
    """Without the stop token."""
    finish_reason: FinishReason


@dataclass(frozen=True)
class Loglikelihood:
    """Negative log-likelihood of a continuation."""

    nll: float
    """Sum over its tokens, in nats."""
    tokens: int
