"""Tower features of the images of prompts: kept on disk for evaluation, or in memory for requests of users."""

# I images, S side in pixels, P patches, C tower channels

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vila_ops.model.features import BATCH, FeatureCache
from vila_ops.model.pixels import Pixels, levels
from vila_ops.model.vila import VilaForConditionalGeneration


class SaltedImage(NamedTuple):
    """An image of a prompt."""

    data: bytes
    """The encoded square."""
    salt: str
    """The cache salt of the prompt."""


class ImageFeatures(Protocol):
    """Encoded squares to tower features."""

    def __call__(self, images: Sequence[bytes]) -> Tensor:
        """Features (I, P, C) of all of these images."""

    def first(self, images: Sequence[SaltedImage]) -> list[Tensor]:
        """Features (P, C) of the first of these images, of at least one and as many as one step may compute."""


class StoredFeatures(FeatureCache):
    """On disk, by the bytes of an image and without a salt; a pass of the tower takes BATCH images."""

    def first(self, images: Sequence[SaltedImage]) -> list[Tensor]:
        """As in `ImageFeatures`."""
        return list(self([image.data for image in images[:BATCH]]))


class RecentFeatures:
    """In memory, those of the images that were used last, by salt, size, mode and pixels.

    Each image is a pass of its own, so that its features do not depend on others, and one step computes one image.
    """

    def __init__(self, model: VilaForConditionalGeneration, pixels: Pixels, *, max_images: int) -> None:
        self.model, self.pixels, self.max_images = model, pixels, max_images
        self.num_computed = 0
        """Images that went through the tower so far."""
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()

    def __call__(self, images: Sequence[bytes]) -> Tensor:
        """As in `ImageFeatures`."""
        return torch.stack([self.first([SaltedImage(image, "")])[0] for image in images])

    def first(self, images: Sequence[SaltedImage]) -> list[Tensor]:
        """As in `ImageFeatures`. Images that are kept are none that the step computes."""
        features: list[Tensor] = []
        computed = False
        for image in images:
            square = levels(image.data)
            key = _key(square, image.salt)
            if key not in self._kept:
                if computed:
                    break
                computed = True
                self._kept[key] = self._compute(square)
            self._kept.move_to_end(key)
            features.append(self._kept[key])
        while len(self._kept) > self.max_images:
            self._kept.popitem(last=False)
        return features

    @torch.no_grad()
    def _compute(self, square: NDArray[np.uint8]) -> Tensor:
        self.num_computed += 1
        device = next(self.model.model.vision_tower.parameters()).device
        features = self.model.tower_features(self.pixels.values(torch.tensor(square)[None].to(device)))[0]
        return features.clone()  # else all that the tower computed of the image would stay in memory


def _key(square: NDArray[np.uint8], salt: str) -> bytes:
    """Of levels (S, S, 3). A digest ends each part, so that no part can end as another begins."""
    parts = (salt.encode(), f"RGB {square.shape} {square.dtype}".encode(), square.tobytes())
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()
