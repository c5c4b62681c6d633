"""The engine of kind torch: the steps of a scheduler, in one thread, and the streams of their readers."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from vila_ops.config.engine import TorchEngine
from vila_ops.data.images import Fit
from vila_ops.data.text.conversation import Tokenizer
from vila_ops.device import free_bytes
from vila_ops.generate.checks import check_request
from vila_ops.generate.engine import Engine, EngineOptions, ScoringItem
from vila_ops.generate.request import Delta, Loglikelihood, Prompt, Sampling
from vila_ops.generate.torch_engine.grammar import Grammars
from vila_ops.generate.torch_engine.image_features import RecentFeatures
from vila_ops.generate.torch_engine.loaded_model import LoadedModel, read_model
from vila_ops.generate.torch_engine.request_state import GenerationRequest
from vila_ops.generate.torch_engine.scheduler import SLOTS, Scheduler
from vila_ops.generate.torch_engine.scorer import Scorer

CACHE_TOKENS = 65_536
"""Most positions of the key-value cache, unless the config has another number or the context is longer."""
KEPT_SHARE = 0.25
"""Tokens of earlier prompts that are kept, for each position of the key-value cache."""
IMAGES_SHARE = 0.125
"""Share of the engine's memory for features of earlier images."""

T = TypeVar("T")
log = logging.getLogger(__name__)


def open_engine(config: TorchEngine, folder: Path, options: EngineOptions) -> Engine:
    """Load a model folder. Raises CorruptArtifact or ValueError with what is wrong with it or with the config."""
    loaded = read_model(folder, options)
    memory = int(config.memory_share * free_bytes(loaded.device))
    memory -= _bounded_features(loaded, memory)
    return InProcessEngine(
        loaded,
        max_batch=options.max_batch,
        cache_tokens=config.cache_tokens or tokens_in(loaded, memory),
        prefill_tokens=options.prefill_tokens,
        keep_prefixes=options.keep_prefixes,
        bound_pauses=options.bound_pauses,
    )


def tokens_in(loaded: LoadedModel, memory: int) -> int:
    """Most positions of the key-value cache by default: what fits into so many bytes, at least a context.

    The bytes hold what is kept of earlier prompts, too, and the features of images that are not read yet: those of
    rows, which have the positions of an image each, and as many that are computed ahead.
    """
    features = 2 * loaded.image_bytes / loaded.tokenizer.image_tokens
    size = loaded.token_bytes * (1 + KEPT_SHARE) + features
    if memory < loaded.context_length * size:
        log.warning(
            "one request of the whole context takes %d MiB, more than the %d MiB of memory_share",
            int(loaded.context_length * size) >> 20, memory >> 20,
        )  # fmt: skip
    return max(loaded.context_length, min(CACHE_TOKENS, int(memory / size)))


def _bounded_features(loaded: LoadedModel, memory: int) -> int:
    """Bound the features of earlier images to their share of so many bytes, and return what they may take."""
    if not isinstance(loaded.features, RecentFeatures):
        return 0
    most = int(IMAGES_SHARE * memory) // loaded.image_bytes
    loaded.features.max_images = min(loaded.features.max_images, most)
    return loaded.features.max_images * loaded.image_bytes


class InProcessEngine:
    """Implements `Engine`. A request that fails does not take the others with it."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        max_batch: int | None,
        cache_tokens: int | None = None,
        prefill_tokens: int = EngineOptions.prefill_tokens,
        keep_prefixes: bool = False,
        bound_pauses: bool = False,
    ) -> None:
        """Raises ValueError for a cache that cannot hold one request."""
        cache_tokens = cache_tokens or max(CACHE_TOKENS, loaded.context_length)
        if cache_tokens < loaded.context_length:
            raise ValueError(
                f"cache_tokens is {cache_tokens}, fewer than the model's context of {loaded.context_length} tokens, "
                f"which one request may have; set it to that or more, or leave it out"
            )
        self.loaded = loaded
        self.scheduler = Scheduler(
            loaded,
            slots=max_batch or SLOTS,
            cache_tokens=cache_tokens,
            prefill_tokens=prefill_tokens,
            prefix_tokens=int(KEPT_SHARE * cache_tokens) if keep_prefixes else 0,
            bound_pauses=bound_pauses,
        )
        self.scorer = Scorer(loaded)
        self.grammars = Grammars(loaded.tokenizer)
        self._requests: dict[str, GenerationRequest] = {}
        self._streams: dict[GenerationRequest, asyncio.Queue[Delta | Exception]] = {}
        self._arrived: list[GenerationRequest] = []
        self._working: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generate")

    @property
    def tokenizer(self) -> Tokenizer:
        """As in `Engine`."""
        return self.loaded.tokenizer

    @property
    def context_length(self) -> int:
        """As in `Engine`."""
        return self.loaded.context_length

    @property
    def image_size(self) -> int:
        """As in `Engine`."""
        side: int = self.loaded.model.config.vision_side
        return side

    @property
    def image_aspect_ratio(self) -> Fit:
        """As in `Engine`."""
        return self.loaded.image_aspect_ratio

    async def generate(self, prompt: Prompt, sampling: Sampling, request_id: str) -> AsyncIterator[Delta]:
        """As in `Engine`. A reader that is cancelled aborts its request."""
        grammar = None
        if sampling.json_schema is not None:
            grammar = await asyncio.to_thread(self.grammars.of, sampling.json_schema)
        check_request(prompt, sampling, request_id, self.tokenizer, self.context_length)
        if request_id in self._requests:
            raise ValueError(f"request {request_id!r} is not finished; choose another id")
        request = self._requests[request_id] = GenerationRequest(prompt, sampling, grammar)
        stream = self._streams[request] = asyncio.Queue()
        self._arrived.append(request)
        if self._working is None or self._working.done():
            self._working = asyncio.get_running_loop().create_task(self._work())
        try:
            while True:
                delta = await stream.get()
                if isinstance(delta, Exception):
                    raise delta
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            request.aborted = True
            del self._streams[request], self._requests[request_id]

    async def abort(self, request_id: str) -> None:
        """As in `Engine`."""
        if request_id in self._requests:
            self._requests[request_id].aborted = True

    async def score(self, items: Sequence[ScoringItem]) -> list[list[Loglikelihood]]:
        """As in `Engine`."""
        return await self._in_thread(self.scorer.score, items)

    async def hidden_states(self, prompt: Prompt, continuation: list[int]) -> NDArray[np.float64]:
        """As in `Engine`."""
        return await self._in_thread(self.scorer.hidden_states, prompt, continuation)

    async def image_features(self, images: Sequence[bytes]) -> NDArray[np.float64]:
        """As in `Engine`."""
        return await self._in_thread(self.loaded.image_features, images)

    def close(self) -> None:
        """As in `Engine`."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _work(self) -> None:
        """Make steps while there are requests. Those of a loop that was closed are aborted by then."""
        while self._arrived or self.scheduler.is_busy:
            arrivals, self._arrived = self._arrived, []
            try:
                events = await self._in_thread(self.scheduler.step, arrivals)
            except Exception as error:  # of no request, or the engine was closed
                log.exception("a step failed, and all requests with it")
                for stream in self._streams.values():
                    stream.put_nowait(error)
                return
            for request, delta in events:
                if request in self._streams:
                    self._streams[request].put_nowait(delta)

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)
