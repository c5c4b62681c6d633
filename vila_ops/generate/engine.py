"""The protocol of engines, and blocking calls of it for batch work. Light: no torch, no transformers."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from vila_ops.config.engine import Precision
from vila_ops.device import Device
from vila_ops.generate.request import Delta, FinishReason, Loglikelihood, Output, Prompt, Sampling

if TYPE_CHECKING:  # heavy: numpy, Pillow, transformers
    import numpy as np
    from numpy.typing import NDArray

    from vila_ops.data.images import Fit
    from vila_ops.data.text.conversation import Tokenizer

ScoringItem = tuple[Prompt, Sequence[list[int]]]
"""A prompt and the token ids of each of its continuations."""


@dataclass(frozen=True)
class EngineOptions:
    """What the caller of an engine decides; an engine's own settings are in its config."""

    feature_root: Path | None = None
    """Folder where the vision tower's image features are stored; None: they stay in memory, of the `max_cached_images`
    that were used last."""
    features_leave_free: float = 0.1
    """Share of that folder's disk that they leave free."""
    device: Device = "auto"
    """What the model computes on."""
    threads: int = 1
    """CPU threads of the computation."""
    precision: Precision = "fp32"
    """Of the language model. The tower computes in fp32, so that its cached features serve training too."""
    max_batch: int | None = None
    """Most requests that are decoded in one batch; None: the engine decides."""
    max_cached_images: int = 256
    """Most images whose features stay in memory; fewer where an eighth of the engine's memory holds no more."""
    prefill_tokens: int = 4096
    """Most tokens of prompts that are read between two tokens of the answers under way; fewer: shorter pauses."""
    bound_pauses: bool = False
    """Whether our engine reads even fewer of them, so that a pause is 1.2 times the time of a token alone."""
    keep_prefixes: bool = False
    """Whether what was read is kept for prompts that begin alike. It changes rounding, by what was asked before."""


class Engine(Protocol):
    """A loaded model that generates, scores and reads hidden states.

    Every method raises ValueError for a prompt that exceeds the context, or whose image tokens do not match its
    images, before it computes anything.
    """

    @property
    def tokenizer(self) -> "Tokenizer":
        """Writes chat prompts and decodes token ids."""

    @property
    def context_length(self) -> int:
        """Most tokens that a prompt and what follows it may have together."""

    @property
    def image_size(self) -> int:
        """Side of the image squares in pixels."""

    @property
    def image_aspect_ratio(self) -> "Fit":
        """How an image becomes a square."""

    def generate(self, prompt: Prompt, sampling: Sampling, request_id: str) -> AsyncIterator[Delta]:
        """Stream the tokens that follow a prompt. `request_id` names no other unfinished request."""

    async def abort(self, request_id: str) -> None:
        """End a request: its stream ends with finish reason "abort" after the current step, at the latest.

        An unknown id changes nothing.
        """

    async def score(self, items: Sequence[ScoringItem]) -> list[list[Loglikelihood]]:
        """The likelihood of each continuation given its prompt, in the order of the items."""

    async def hidden_states(self, prompt: Prompt, continuation: list[int]) -> "NDArray[np.float64]":
        """Hidden states (layers + 1, T, D) of a prompt and its continuation: the embeddings, then each layer's output.

        The last one is after the final norm, as the language model head reads it.
        """

    async def image_features(self, images: Sequence[bytes]) -> "NDArray[np.float64]":
        """Means over patches (I, C) of the features that the vision tower gives of encoded squares."""

    def close(self) -> None:
        """Release threads and memory after the work that is under way."""


async def generate_output(engine: Engine, prompt: Prompt, sampling: Sampling, request_id: str) -> Output:
    """The whole stream of one request as one output."""
    ids: list[int] = []
    reason: FinishReason | None = None
    async for delta in engine.generate(prompt, sampling, request_id):
        ids += delta.ids
        reason = delta.finish_reason
    if reason is None:
        raise RuntimeError(f"the stream of request {request_id!r} ended without a finish reason")
    return Output(ids, reason)


def generate_all(engine: Engine, prompts: Sequence[Prompt], sampling: Sampling) -> list[Output]:
    """The outputs of many prompts, in their order. Blocks; not for use inside an event loop."""

    async def outputs() -> list[Output]:
        requests = [generate_output(engine, prompt, sampling, f"{index}") for index, prompt in enumerate(prompts)]
        return await asyncio.gather(*requests)

    return asyncio.run(outputs())


def score_all(engine: Engine, items: Sequence[ScoringItem]) -> list[list[Loglikelihood]]:
    """As `Engine.score`. Blocks; not for use inside an event loop."""
    return asyncio.run(engine.score(items))


def hidden_states_of(engine: Engine, prompt: Prompt, continuation: list[int]) -> "NDArray[np.float64]":
    """As `Engine.hidden_states`. Blocks; not for use inside an event loop."""
    return asyncio.run(engine.hidden_states(prompt, continuation))


def image_features_of(engine: Engine, images: Sequence[bytes]) -> "NDArray[np.float64]":
    """As `Engine.image_features`. Blocks; not for use inside an event loop."""
    return asyncio.run(engine.image_features(images))
