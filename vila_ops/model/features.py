"""Features of a frozen tower, computed once for each picture and kept on disk."""

# I images, P patches, C tower channels, S side in pixels

import hashlib
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vila_ops.model.vila import VilaForConditionalGeneration

BATCH = 16
"""Pictures per tower pass, always, padded with blanks: a picture's features then depend on nothing but itself."""

Pixels = Callable[[Sequence[bytes]], NDArray[np.float32]]
"""Encoded squares to pixel values (I, 3, S, S)."""


class FeatureCache:
    """Tower features by the sha256 of a picture's bytes, fp32, one file each."""

    def __init__(self, model: VilaForConditionalGeneration, pixels: Pixels, *, root: Path) -> None:
        self.model = model
        self.pixels = pixels
        self.folder = root / tower_digest(model)

    @torch.no_grad()
    def __call__(self, images: Sequence[bytes]) -> Tensor:
        """Features (I, P, C) of encoded squares, in their order; computed where they are not on disk yet."""
        keys = [hashlib.sha256(image).hexdigest() for image in images]
        missing = [(key, image) for key, image in dict(zip(keys, images, strict=True)).items() if not self._has(key)]
        for start in range(0, len(missing), BATCH):
            self._compute(missing[start : start + BATCH])
        return torch.from_numpy(np.stack([np.load(self._path(key), allow_pickle=False) for key in keys]))

    def _compute(self, batch: list[tuple[str, bytes]]) -> None:
        values = torch.from_numpy(self.pixels([image for _, image in batch]))
        padded = torch.cat([values, values.new_zeros(BATCH - len(values), *values.shape[1:])])
        device = next(self.model.model.vision_tower.parameters()).device
        features = self.model.tower_features(padded.to(device)).float().cpu().numpy()
        for (key, _), feature in zip(batch, features, strict=False):
            path = self._path(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(f".{key}-{secrets.token_hex(4)}.npy")
            np.save(draft, feature, allow_pickle=False)
            os.replace(draft, path)

    def _has(self, key: str) -> bool:
        return self._path(key).is_file()

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.npy"


def tower_digest(model: VilaForConditionalGeneration) -> str:
    """sha256 over the tower's weights and over which of its states is read."""
    digest = hashlib.sha256()
    config = model.config
    digest.update(f"{config.vision_feature_layer} {config.vision_feature_select_strategy}".encode())
    for name, tensor in sorted(model.model.vision_tower.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()[:32]
