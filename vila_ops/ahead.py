"""Work that threads do ahead of its use: results in order, and a bounded number of them in memory."""

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
END_SECONDS = 30.0
"""How long the end of the threads waits for the work in progress."""
INTERRUPT_SECONDS = 1.0
"""How long an interrupt may wait that comes just before a wait begins, which it then does not end."""
log = logging.getLogger(__name__)


class Workers:
    """Threads that work one after another on what they are given. They end with the context.

    They are daemons: the interpreter waits for other threads before it exits, and one may be stuck in a dead disk.
    """

    def __init__(self, number: int, *, name: str) -> None:
        self._queue: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._run, name=name, daemon=True) for _ in range(number)]
        self._ended = False

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End the threads. Work that has not started is dropped."""
        self._ended = True
        for _ in self._threads:
            self._queue.put(None)
        deadline = time.monotonic() + END_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if stuck := [thread.name for thread in self._threads if thread.is_alive()]:
            log.warning("threads %s did not end in %.0f s", stuck, END_SECONDS)

    def submit(self, work: Callable[[], Result]) -> "Future[Result]":
        """Give work to the threads. The result of the future waits for it, and raises its error."""
        future: Future[Result] = Future()
        self._queue.put((future, work))
        return future

    def _run(self) -> None:
        """Work until the end; each thread runs this."""
        while (task := self._queue.get()) is not None:
            future, work = task
            if self._ended or not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001 raised where the result is taken
                future.set_exception(error)
            del task, future, work  # a thread that waits keeps no result alive


class Ahead(Generic[Item, Result]):
    """The results of `work` on items, in the order of the items, computed ahead by threads.

    At most `depth` items are begun and not taken. An error is raised where its item's turn comes, so what is taken does
    not depend on the number of threads.
    """

    def __init__(self, workers: Workers, work: Callable[[Item], Result], items: Iterable[Item], *, depth: int) -> None:
        self._workers, self._work, self._items = workers, work, iter(items)
        self.wait_seconds = 0.0
        """How long the thread that takes the results has waited for them."""
        self._begun: deque[Future[Result]] = deque()
        self._depth = depth
        self.refill()

    def __iter__(self) -> Iterator[Result]:
        return self

    def __next__(self) -> Result:
        """The next result; waits for it."""
        if not self._begun:
            raise StopIteration
        result = self.take()
        self.refill()
        return result

    def take(self) -> Result:
        """The next result, of which there has to be one; waits for it. No other item is begun until `refill`."""
        self._wait(self._begun[0])
        result = self._begun[0].result()
        self._begun.popleft()
        return result

    def refill(self) -> None:
        """Begin items until `depth` are begun. The threads that wake compete for the interpreter from now on."""
        for item in itertools.islice(self._items, self._depth - len(self._begun)):
            self._begun.append(self._workers.submit(partial(self._work, item)))

    def is_ready(self) -> bool:
        """Whether the next result is there, so that taking it does not wait."""
        return bool(self._begun) and self._begun[0].done() and self._begun[0].exception() is None

    def upcoming(self) -> Iterator[Result]:
        """The results after the last one taken, without taking them; waits for each. Ends before one that failed."""
        for future in list(self._begun):
            self._wait(future)
            if future.exception() is not None:
                return
            yield future.result()

    def drop(self) -> None:
        """Begin no more work, and none that no thread has started."""
        self._items = iter(())
        for future in self._begun:
            future.cancel()
        self._begun.clear()

    def _wait(self, future: Future[Result]) -> None:
        began = time.perf_counter()
        while True:
            try:
                future.exception(timeout=INTERRUPT_SECONDS)
                break
            except TimeoutError:
                continue
        self.wait_seconds += time.perf_counter() - began
