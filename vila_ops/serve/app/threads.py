"""Work on what a client sent, which may be long, beside an event loop that answers others."""

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

SMALL = 16 * 2**10
"""Bytes or characters up to which parsing and tokenising take less time than a thread takes to begin."""

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread_if_long(size: int, work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """What the work returns; it runs in a thread if its input is long."""
    return work(*arguments, **named) if size <= SMALL else await asyncio.to_thread(work, *arguments, **named)
