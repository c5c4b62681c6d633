"""The result of one check."""

from collections.abc import Callable, Iterator

from vila_ops.config import Config
from vila_ops.errors import VilaError


class Finding(Config):
    """The result of one check."""

    ok: bool
    text: str
    """What is there; where it is not ok, also how to fix it."""


def tried(check: Callable[[], str]) -> Iterator[Finding]:
    """A check that returns what is there, or says by an error what is wrong."""
    try:
        yield Finding(ok=True, text=check())
    except (ValueError, VilaError, OSError) as error:
        yield Finding(ok=False, text=str(error))
