"""Tower features of the images of prompts: kept on disk for evaluation, or in memory for requests of users."""

# I images, S side in pixels, P patches, C tower channels

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vila_ops.generate.torch_engine.tower_pass import TowerPass, pause_between_layers
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

    def first(self, images: Sequence[SaltedImage], seconds: float | None = None) -> list[Tensor]:
        """Features (P, C) of the first of these images: as many as one step may compute, and at least one.

        After about so many `seconds` of computing, an image may be left unfinished: then it is none of them, and the
        next call goes on with it.
        """


class StoredFeatures(FeatureCache):
    """On disk, by the bytes of an image and without a salt; a pass of the tower takes BATCH images."""

    def first(self, images: Sequence[SaltedImage], seconds: float | None = None) -> list[Tensor]:
        """As in `ImageFeatures`; every image is finished."""
        return list(self([image.data for image in images[:BATCH]]))


@dataclass(frozen=True)
class _Begun:
    """An image whose features are being computed."""

    image: SaltedImage
    key: bytes
    tower_pass: TowerPass


class RecentFeatures:
    """In memory, those of the images that were used last, by salt, size, mode and pixels.

    Each image is a pass of its own, so that its features do not depend on others, and one step computes one image.
    """

    def __init__(self, model: VilaForConditionalGeneration, pixels: Pixels, *, max_images: int) -> None:
        self.model, self.pixels, self.max_images = model, pixels, max_images
        self.num_computed = 0
        """Images that went into the tower so far."""
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()
        self._unfinished: _Begun | None = None
        pause_between_layers(model.model.vision_tower)

    def __call__(self, images: Sequence[bytes]) -> Tensor:
        """As in `ImageFeatures`."""
        return torch.stack([self.first([SaltedImage(image, "")])[0] for image in images])

    @torch.no_grad()
    def first(self, images: Sequence[SaltedImage], seconds: float | None = None) -> list[Tensor]:
        """As in `ImageFeatures`. Images that are kept are none that the step computes.

        An unfinished image is finished first, wherever among these images it is; it is dropped if it is none of them.
        """
        features: list[Tensor] = []
        unfinished, computed = self._unfinished, False
        if unfinished is not None and unfinished.image in images:
            self._go_on(unfinished, seconds)
            computed = True
        elif unfinished is not None:
            unfinished.tower_pass.close()
            self._unfinished = None
        for image in images:
            if self._unfinished is not None and self._unfinished.image == image:
                break
            begun = self._begin(image)
            if begun.key not in self._kept:
                if computed:
                    self._unfinished = self._unfinished or begun
                    break
                computed = True
                self._go_on(begun, seconds)
                if self._unfinished is not None:
                    break
            self._kept.move_to_end(begun.key)
            features.append(self._kept[begun.key])
        while len(self._kept) > self.max_images:
            self._kept.popitem(last=False)
        return features

    @property
    def _device(self) -> torch.device:
        """Where the tower is."""
        device: torch.device = next(self.model.model.vision_tower.parameters()).device
        return device

    def _begin(self, image: SaltedImage) -> _Begun:
        square = levels(image.data)
        return _Begun(image, _key(square, image.salt), TowerPass(lambda: self._compute(square), self._device))

    def _go_on(self, begun: _Begun, seconds: float | None) -> None:
        """Keep the features of an image, or note that they are not finished."""
        self._unfinished = None
        found = begun.tower_pass.run_for(seconds)
        if found is None:
            self._unfinished = begun
        else:
            self._kept[begun.key] = found

    def _compute(self, square: NDArray[np.uint8]) -> Tensor:
        self.num_computed += 1
        features = self.model.tower_features(self.pixels.values(torch.tensor(square)[None].to(self._device)))[0]
        return features.clone()  # else all that the tower computed of the image would stay in memory


def _key(square: NDArray[np.uint8], salt: str) -> bytes:
    """Of levels (S, S, 3). A digest ends each part, so that no part can end as another begins."""
    parts = (salt.encode(), f"RGB {square.shape} {square.dtype}".encode(), square.tobytes())
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()
