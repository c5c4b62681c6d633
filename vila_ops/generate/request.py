"""What an engine reads and returns: prompts, sampling settings, outputs and likelihoods. Imports no torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
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
    cache_salt: str = ""
    """What an engine caches of a prompt, it uses only for prompts with the same salt; those of different salts get
    places in turn."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, up to a stop token or a number of tokens; by default greedily."""

    max_new_tokens: int
    stop_ids: frozenset[int]
    temperature: float = 0.0
    """Logits are divided by it; 0: the likeliest token is chosen, whatever the next four settings are."""
    top_p: float = 1.0
    """Only the likeliest tokens are drawn whose probabilities together reach it."""
    top_k: int = 0
    """Only this many of the likeliest tokens are drawn; 0: all of them."""
    min_p: float = 0.0
    """Only tokens are drawn with at least this share of the probability of the likeliest one."""
    seed: int | None = None
    """A draw depends on seed, choice and position alone; None: on a seed that is random for each request."""
    choice: int = 0
    """The number of this answer among the answers to one prompt."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that the answer has."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of a token once for each time that the answer has it."""
    repetition_penalty: float = 1.0
    """Positive logits of tokens that prompt or answer have are divided by it, negative ones multiplied."""
    logprobs: int | None = None
    """How many of the likeliest tokens are reported beside each chosen token; None: no log-probabilities."""
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    """Token id -> what is added to its logit."""
    json_schema: str | None = None
    """JSON text of a schema of `vila_ops.generate.json_grammar`, which the answer follows; an answer that ends with
    "length" is the beginning of one that does. None: any text."""

    def __post_init__(self) -> None:
        """Raise ValueError for a setting outside of its range."""
        rules = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "a finite number"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "a finite number"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "0 or more"),
            ("logit_bias", all(one < math.inf for one in self.logit_bias.values()), "below infinity"),
        )
        for name, is_right, rule in rules:
            if not is_right:
                raise ValueError(f"{name} is {getattr(self, name)}; it has to be {rule}")


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probabilities in nats at one position, before sampling settings change them."""

    id: int
    """The chosen token."""
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """Ids and log-probabilities of the likeliest tokens, the likeliest first."""


@dataclass(frozen=True)
class Delta:
    """The next tokens of a stream; the last delta of a stream has the finish reason."""

    ids: list[int]
    """Without the stop token."""
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each id, if the request asks for them."""
    cached_tokens: int = 0
    """In the first delta: tokens of the prompt that were not read again, because an earlier one began with them."""


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
