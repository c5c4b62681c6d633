import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from vila_ops import ahead
from vila_ops.ahead import Ahead, Workers


def living(name: str) -> list[threading.Thread]:
    """Threads that do not end, on however busy a machine."""
    named = [thread for thread in threading.enumerate() if thread.name == name]
    for thread in named:
        thread.join(60)
    return [thread for thread in named if thread.is_alive()]


def ends(workers: Workers) -> bool:
    """Wait until the threads were told to end."""
    while not workers._ended:
        time.sleep(0.001)
    return True


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_come_in_order_and_a_bounded_number_is_begun(threads: int) -> None:
    begun: list[int] = []
    deep_enough = threading.Semaphore(0)
    turns = [threading.Event() for _ in range(20)]

    def work(item: int) -> int:
        begun.append(item)
        deep_enough.release()
        turns[item].wait(60)
        return item * item

    def items() -> Iterator[int]:
        yield from range(20)

    with Workers(threads, name="in_order") as workers:
        results = Ahead(workers, work, items(), depth=5)
        for _ in range(threads):
            assert deep_enough.acquire(timeout=60), "nothing was taken yet, and as many threads work"
        for item in reversed(range(20)):  # the later ones may end before the earlier ones
            turns[item].set()
        taken = []
        for result in results:
            taken.append(result)
            assert len(begun) <= len(taken) + 5
    assert taken == [item * item for item in range(20)]
    assert sorted(begun) == list(range(20))
    assert living("in_order") == []


def test_an_error_is_raised_where_its_turn_comes_and_what_came_before_is_given() -> None:
    def work(item: int) -> int:
        if item == 3:
            raise ValueError("item 3")
        return item

    with Workers(3, name="failing") as workers:
        results = Ahead(workers, work, range(6), depth=6)
        assert [next(results) for _ in range(2)] == [0, 1]
        assert list(results.upcoming()) == [2], "up to the one that failed"
        assert next(results) == 2
        for _ in range(2):
            with pytest.raises(ValueError, match="item 3"):
                next(results)
        assert not results.is_ready()
    assert living("failing") == []


def test_threads_end_after_an_error_of_the_loop_and_drop_what_has_not_begun() -> None:
    begun: list[int] = []
    first, go_on = threading.Event(), threading.Event()

    def work(item: int) -> None:
        begun.append(item)
        first.set()
        go_on.wait(60)

    def interrupted() -> None:
        with Workers(1, name="interrupted") as workers:
            Ahead(workers, work, range(100), depth=50)
            assert first.wait(60)
            threading.Thread(target=lambda: go_on.set() if ends(workers) else None).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert begun == [0]
    assert living("interrupted") == []


def test_a_dropped_row_of_work_begins_nothing_more() -> None:
    begun: list[int] = []
    with Workers(1, name="dropped") as workers:
        blocked = threading.Event()
        workers.submit(lambda: blocked.wait(60))
        Ahead(workers, begun.append, range(10), depth=4).drop()
        blocked.set()
        assert workers.submit(lambda: "next").result(60) == "next"
    assert begun == []


STUCK = """
import os, signal, threading
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
from vila_ops import ahead
ahead.END_SECONDS = 0.5
def work(item):
    os.write(1, b"begun\\n")
    threading.Event().wait()  # as a read from a disk that is gone
with ahead.Workers(2, name="stuck") as workers:
    next(ahead.Ahead(workers, work, range(4), depth=4))
"""


def test_an_interrupt_ends_a_process_whose_threads_are_stuck() -> None:
    process = subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        assert [process.stdout.readline() for _ in range(2)] == ["begun\n"] * 2
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0
    assert "KeyboardInterrupt" in errors
    assert "did not end in" in errors
    assert ahead.END_SECONDS > 0.5
