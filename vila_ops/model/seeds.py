"""Where random numbers of a model come from: a generator for each purpose, never torch's global one.

A draw so depends on its seed and on what it is for, and on nothing that the process did before.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def generator(seed: int, purpose: str) -> torch.Generator:
    """A CPU generator of its own for one draw, say of the parameter called `purpose`."""
    return torch.Generator().manual_seed(_derived(seed, purpose))


@contextmanager
def isolated(seed: int, purpose: str) -> Iterator[None]:
    """For third-party code that takes no generator: torch's global CPU generator is seeded, and put back afterwards."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(_derived(seed, purpose))  # torch.manual_seed would reseed every GPU too
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _derived(seed: int, purpose: str) -> int:
    """63 bits that differ between purposes."""
    text = json.dumps([seed, purpose])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
