"""Between HTTP and the generator: requests that wait at the same time are decoded as one batch, in one thread."""

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from vila_ops.generate.engine import Answer, Generator, Prompt

WAIT_SECONDS = 0.005
"""How long an idle batcher waits for company; a busy one takes what came while it was busy."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Waiting:
    prompt: Prompt
    max_new_tokens: int
    answer: "asyncio.Future[Answer]"


class Batcher:
    """Answers of concurrent requests. A request that fails does not take the others of its batch with it."""

    def __init__(self, generator: Generator, *, max_batch: int) -> None:
        self.generator, self.max_batch = generator, max_batch
        self._waiting: list[_Waiting] = []
        self._working: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generate")

    async def answer(self, prompt: Prompt, *, max_new_tokens: int) -> Answer:
        """The greedy answer to one prompt. A caller that is cancelled before its turn costs nothing."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        self._waiting.append(_Waiting(prompt, max_new_tokens, future))
        if self._working is None:
            self._working = loop.create_task(self._work())
        return await future

    def close(self) -> None:
        """End the thread after the batch that it works on."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _work(self) -> None:
        try:
            await asyncio.sleep(WAIT_SECONDS)
            while batch := self._take():
                await self._decode(batch)
        finally:
            self._working = None

    def _take(self) -> list[_Waiting]:
        """The oldest requests that are still wanted and fit into one batch and into the model's context together."""
        self._waiting = [one for one in self._waiting if not one.answer.done()]
        batch: list[_Waiting] = []
        for one in self._waiting[: self.max_batch]:
            longest = max(len(each.prompt.input_ids) for each in (*batch, one))
            most = max(each.max_new_tokens for each in (*batch, one))
            if batch and longest + most > self.generator.max_tokens:
                break
            batch.append(one)
        self._waiting = self._waiting[len(batch) :]
        return batch

    async def _decode(self, batch: list[_Waiting]) -> None:
        try:
            answers = await asyncio.get_running_loop().run_in_executor(self._thread, self._generate, batch)
        except Exception as error:  # noqa: BLE001 whatever it was, those who wait must be told
            if len(batch) == 1:
                _settle(batch[0].answer, error)
                return
            log.warning("a batch of %d failed (%r); its requests are tried one by one", len(batch), error)
            for one in batch:
                await self._decode([one])
            return
        for one, answer in zip(batch, answers, strict=True):
            _settle(one.answer, answer)

    def _generate(self, batch: Sequence[_Waiting]) -> list[Answer]:
        most = max(one.max_new_tokens for one in batch)
        answers = self.generator.generate([one.prompt for one in batch], max_new_tokens=most)
        return [_cut(answer, one.max_new_tokens) for one, answer in zip(batch, answers, strict=True)]


def _cut(answer: Answer, max_new_tokens: int) -> Answer:
    """What a greedy answer would be under a smaller bound: its end costs a step too."""
    if len(answer.ids) < max_new_tokens:
        return answer
    return Answer(answer.ids[:max_new_tokens], finished=False)


def _settle(future: "asyncio.Future[Answer]", result: Answer | Exception) -> None:
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
