"""Processes that race each other: forks of a server without threads.

A fork of the test's own process may die of the threads that Ray or torch left in it.
"""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import ForkServerProcess
from typing import Any

FORKS = multiprocessing.get_context("forkserver")


def racers(count: int) -> ProcessPoolExecutor:
    """Processes for the functions of a module, in the environment of now. One that dies fails what waits for it."""
    return ProcessPoolExecutor(count, mp_context=FORKS, initializer=_take, initargs=(dict(os.environ),))


def racer(target: Callable[..., object], *arguments: Any) -> ForkServerProcess:
    """A started process that calls a function of a module, in the environment of now."""
    process = FORKS.Process(target=_call, args=(dict(os.environ), target, *arguments))
    process.start()
    return process


def _take(environment: dict[str, str]) -> None:
    """Take the environment, for the server has that of its own start."""
    os.environ.update(environment)


def _call(environment: dict[str, str], target: Callable[..., object], *arguments: Any) -> None:
    _take(environment)
    target(*arguments)
