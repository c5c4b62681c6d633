"""Keys and values of sequences that were read, for later prompts that begin alike; their number has a bound."""

# T tokens, H key-value heads, K head dim

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

MAX_SEQUENCES = 64
"""Most sequences that are kept: a prompt is compared with each of them."""

Layers = list[tuple[Tensor, Tensor]]
"""Keys and values (H, T, K) of each layer."""


@dataclass(frozen=True, eq=False)
class TokenSequence:
    """Tokens, with all that their keys and values depend on but the weights."""

    salt: str
    ids: NDArray[np.int64]
    """(T,)"""
    images: tuple[bytes, ...]
    """A digest of each image."""
    spans: tuple[tuple[int, int], ...]
    """First position of each image, and the one after its last."""

    @classmethod
    def of(
        cls, ids: Sequence[int], images: tuple[bytes, ...], *, salt: str, image_id: int, image_tokens: int
    ) -> "TokenSequence":
        """Of ids in which each image is `image_tokens` copies of `image_id`."""
        array = np.asarray(ids, np.int64)
        starts = np.flatnonzero(array == image_id)[::image_tokens].tolist()
        return cls(salt, array, images, tuple((start, start + image_tokens) for start in starts))

    def common(self, other: "TokenSequence") -> int:
        """How many first tokens are the same in both, images included; no image is cut."""
        if self.salt != other.salt:
            return 0
        length = min(len(self.ids), len(other.ids))
        differs = np.flatnonzero(self.ids[:length] != other.ids[:length])
        same = int(differs[0]) if len(differs) else length
        for (start, _), one, two in zip(self.spans, self.images, other.images, strict=False):
            if one != two:
                same = min(same, start)
                break
        return self.outside_images(same)

    def outside_images(self, length: int) -> int:
        """The longest prefix of at most so many tokens that ends inside no image."""
        return next((start for start, stop in self.spans if start < length < stop), length)

    def images_in(self, length: int) -> int:
        """How many images end within the first tokens."""
        return sum(stop <= length for _, stop in self.spans)


class PrefixCache:
    """The sequences that were used last."""

    def __init__(self, *, max_tokens: int) -> None:
        """`max_tokens` bounds the tokens of all sequences together; 0: none is kept."""
        self.max_tokens = max_tokens
        self._kept: list[tuple[TokenSequence, Layers]] = []
        """The one that was used last is the last."""

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys and values are kept."""
        return sum(len(sequence.ids) for sequence, _ in self._kept)

    def wants(self, sequence: TokenSequence) -> bool:
        """Whether `keep` would keep a sequence: it fits, and none that is kept begins with all of it."""
        length = len(sequence.ids)
        return 0 < length <= self.max_tokens and all(sequence.common(kept) < length for kept, _ in self._kept)

    def keep(self, sequence: TokenSequence, layers: Layers) -> None:
        """Keep a sequence in place of those with which it begins, and drop those that were used longest ago."""
        self._kept = [one for one in self._kept if sequence.common(one[0]) < len(one[0].ids)]
        self._kept.append((sequence, layers))
        while self.num_tokens > self.max_tokens or len(self._kept) > MAX_SEQUENCES:
            del self._kept[0]

    def longest(self, sequence: TokenSequence) -> tuple[int, Layers]:
        """How many first tokens of a prompt are kept, and layers that begin with them; at least one token is not."""
        most, best = 0, -1
        for place, (kept, _) in enumerate(self._kept):
            same = sequence.outside_images(min(sequence.common(kept), len(sequence.ids) - 1))
            if same > most:
                most, best = same, place
        if best < 0:
            return 0, []
        self._kept.append(self._kept.pop(best))
        return most, self._kept[-1][1]
