"""The choices of one request, side by side in the engine, within the time that the service grants."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Self

from vila_ops.errors import UnsupportedSetting
from vila_ops.generate.engine import Engine
from vila_ops.generate.request import Delta, Prompt, Sampling
from vila_ops.serve.app.errors import ApiError


class Generation:
    """An async context manager that ends in the engine what is still generated when it is left."""

    def __init__(
        self, engine: Engine, prompt: Prompt, samplings: Sequence[Sampling], *, timeout_seconds: float
    ) -> None:
        self._engine, self._prompt, self._samplings = engine, prompt, samplings
        self._timeout_seconds = timeout_seconds
        self._deltas: asyncio.Queue[tuple[int, Delta | Exception]] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._open = set(range(len(samplings)))

    async def __aenter__(self) -> Self:
        self._deadline = asyncio.get_running_loop().time() + self._timeout_seconds
        self._tasks = [asyncio.create_task(self._read(index)) for index in range(len(self._samplings))]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def end(self, index: int) -> None:
        """End one choice; nothing more of it is read."""
        self._open.discard(index)
        self._tasks[index].cancel()

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """The deltas of all choices as they come, with the choice's index, until all have ended.

        Raises ApiError 504 after the timeout, 503 where the engine ends a choice by itself, and 400 for a setting that
        it cannot follow.
        """
        while self._open:
            try:
                async with asyncio.timeout_at(self._deadline):
                    index, delta = await self._deltas.get()
            except TimeoutError:
                text = f"there was no answer within {self._timeout_seconds:g} seconds; try again, or ask for less"
                raise ApiError(504, text, code="timeout") from None
            if index not in self._open:
                continue
            if isinstance(delta, UnsupportedSetting):
                raise ApiError(400, f"{delta.name}: {delta}", param=delta.name, code="unsupported_value") from delta
            if isinstance(delta, Exception):
                raise delta
            if delta.finish_reason == "abort":
                raise ApiError(503, "the endpoint is shutting down; try again", code="shutting_down")
            if delta.finish_reason is not None:
                self._open.discard(index)
            yield index, delta

    async def _read(self, index: int) -> None:
        request_id = uuid.uuid4().hex
        try:
            async for delta in self._engine.generate(self._prompt, self._samplings[index], request_id):
                self._deltas.put_nowait((index, delta))
        except Exception as error:  # noqa: BLE001 it is raised where the deltas are read
            self._deltas.put_nowait((index, error))
