"""Random numbers of a model: one generator for each purpose, never torch's global one.

So a draw depends on its seed and purpose only, not on what the process did before.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def generator(seed: int, purpose: str) -> torch.Generator:
    """A new CPU generator for one purpose, such as the name of a parameter."""
    return torch.Generator().manual_seed(_derived(seed, purpose))


@contextmanager
def isolated(seed: int, purpose: str) -> Iterator[None]:
    """Seed torch's global CPU generator for third-party code that takes no generator, and restore it afterwards."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(_derived(seed, purpose))  # torch.manual_seed would reseed every GPU too
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _derived(seed: int, purpose: str) -> int:
    """A seed of 63 bits, by seed and purpose."""
    text = json.dumps([seed, purpose])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
