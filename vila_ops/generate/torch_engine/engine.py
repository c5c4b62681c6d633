"""The engine of kind torch: requests that wait at the same time are decoded as one batch, in one thread."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from vila_ops.config.engine import TorchEngine
from vila_ops.data.images import Fit
from vila_ops.data.text.conversation import Tokenizer
from vila_ops.generate.engine import Engine, EngineOptions, ScoringItem
from vila_ops.generate.request import Delta, Loglikelihood, Prompt, Sampling
from vila_ops.generate.torch_engine.loaded_model import LoadedModel, read_model
from vila_ops.generate.torch_engine.scheduler import GenerationRequest, Scheduler
from vila_ops.generate.torch_engine.scorer import Scorer

WAIT_SECONDS = 0.005
"""How long an idle engine waits for more requests; a busy one takes those that came meanwhile."""

T = TypeVar("T")
log = logging.getLogger(__name__)


def open_engine(config: TorchEngine, folder: Path, options: EngineOptions) -> Engine:
    """Load a model folder. Raises CorruptArtifact or ValueError with what is wrong with it."""
    return InProcessEngine(read_model(folder, options), max_batch=options.max_batch)


class _Stream:
    """A request and the deltas that its reader has not taken yet. Used in the event loop only."""

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self.deltas: asyncio.Queue[Delta | Exception] = asyncio.Queue()
        self.sent = 0
        self.ended = False

    def put(self, delta: Delta, *, start: int) -> None:
        """Add a delta whose ids begin at position `start` of the answer; ids that were sent before are left out."""
        ids = delta.ids[max(0, self.sent - start) :]
        self.sent += len(ids)
        self.ended = delta.finish_reason is not None
        if ids or self.ended:
            self.deltas.put_nowait(Delta(ids, delta.finish_reason))

    def abort(self) -> None:
        """End without more ids."""
        self.put(Delta([], "abort"), start=self.sent)

    def fail(self, error: Exception) -> None:
        """End with an error."""
        self.ended = True
        self.deltas.put_nowait(error)


class InProcessEngine:
    """Implements `Engine`. A request that fails does not take the others of its batch with it."""

    def __init__(self, loaded: LoadedModel, *, max_batch: int | None) -> None:
        self.loaded, self.max_batch = loaded, max_batch
        self.scheduler, self.scorer = Scheduler(loaded), Scorer(loaded)
        self._streams: dict[str, _Stream] = {}
        self._waiting: list[_Stream] = []
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
        request = GenerationRequest(prompt, sampling)
        self.loaded.check_length(request.max_tokens())
        self.loaded.check_images(prompt, f"the prompt of request {request_id!r}")
        if request_id in self._streams:
            raise ValueError(f"request {request_id!r} is not finished; choose another id")
        stream = self._streams[request_id] = _Stream(request)
        self._waiting.append(stream)
        if self._working is None or self._working.done():
            self._working = asyncio.get_running_loop().create_task(self._work())
        try:
            while True:
                delta = await stream.deltas.get()
                if isinstance(delta, Exception):
                    raise delta
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            request.aborted = True
            del self._streams[request_id]

    async def abort(self, request_id: str) -> None:
        """As in `Engine`. A request that waits ends at once, a running one after its current step."""
        stream = self._streams.get(request_id)
        if stream is None:
            return
        stream.request.aborted = True
        if stream in self._waiting:
            self._waiting.remove(stream)
            stream.abort()

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
        await asyncio.sleep(WAIT_SECONDS)
        while batch := self._take():
            await self._decode(batch)

    def _take(self) -> list[_Stream]:
        """The oldest requests that are not aborted, as many as a batch may have."""
        waiting = [stream for stream in self._waiting if not stream.request.aborted]
        batch = waiting[: self.max_batch]
        self._waiting = waiting[len(batch) :]
        return batch

    async def _decode(self, batch: list[_Stream]) -> None:
        try:
            await self._run(batch)
        except Exception as error:  # noqa: BLE001 whatever it is, the readers must learn of it
            if len(batch) == 1:
                batch[0].fail(error)
                return
            log.warning("a batch of %d failed (%r); its requests are tried one by one", len(batch), error)
            for stream in batch:
                if stream.request.aborted and not stream.ended:
                    stream.abort()
                elif not stream.ended:
                    await self._decode([stream])

    async def _run(self, batch: list[_Stream]) -> None:
        steps: Iterator[list[tuple[int, Delta]]] = self.scheduler.run([stream.request for stream in batch])
        lengths = [0] * len(batch)
        nothing: list[tuple[int, Delta]] = []
        while deltas := await self._in_thread(next, steps, nothing):
            for index, delta in deltas:
                batch[index].put(delta, start=lengths[index])
                lengths[index] += len(delta.ids)

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)
