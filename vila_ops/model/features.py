"""Features of a frozen tower, computed once for each picture and kept on disk."""

# I images, P patches, C tower channels, S side in pixels

import hashlib
import io
import json
import os
import secrets
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as Pillow
from torch import Tensor

from vila_ops.model.vila import VilaForConditionalGeneration

BATCH = 16
"""Pictures per tower pass, always, padded with blanks: a picture's features then depend on nothing but itself."""

NOT_SHAPE = ("_name_or_path", "architectures", "dtype", "transformers_version")

Pixels = Callable[[Sequence[bytes]], NDArray[np.float32]]
"""Encoded squares to pixel values (I, 3, S, S)."""


class FeatureCache:
    """Tower features by the sha256 of a picture's bytes, fp32, one file each (npz: it carries a checksum)."""

    def __init__(self, model: VilaForConditionalGeneration, pixels: Pixels, *, root: Path) -> None:
        self.model = model
        self.pixels = pixels
        self.folder = root / f"{tower_digest(model)}-{_pixels_digest(pixels)}"

    @torch.no_grad()
    def __call__(self, images: Sequence[bytes]) -> Tensor:
        """Features (I, P, C) of encoded squares, in their order; computed where they are not on disk yet."""
        keys = [hashlib.sha256(image).hexdigest() for image in images]
        found = {key: self._read(key) for key in keys}
        missing = [(key, image) for key, image in dict(zip(keys, images, strict=True)).items() if found[key] is None]
        for start in range(0, len(missing), BATCH):
            found |= self._compute(missing[start : start + BATCH])
        return torch.from_numpy(np.stack([feature for key in keys if (feature := found[key]) is not None]))

    def _compute(self, batch: list[tuple[str, bytes]]) -> dict[str, NDArray[np.float32]]:
        values = torch.from_numpy(self.pixels([image for _, image in batch]))
        padded = torch.cat([values, values.new_zeros(BATCH - len(values), *values.shape[1:])])
        device = next(self.model.model.vision_tower.parameters()).device
        features = self.model.tower_features(padded.to(device)).float().cpu().numpy()
        found = {key: feature for (key, _), feature in zip(batch, features, strict=False)}
        for key, feature in found.items():
            path = self._path(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(f".{key}-{secrets.token_hex(4)}.npz")
            np.savez(draft, features=feature)
            os.replace(draft, path)
        return found

    def _read(self, key: str) -> NDArray[np.float32] | None:
        """Features from disk; None where they are not, or not whole."""
        try:
            with self._path(key).open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                features: NDArray[np.float32] = file["features"]
                return features
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
            return None

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.npz"


def tower_digest(model: VilaForConditionalGeneration) -> str:
    """sha256 over the tower's weights, its shape, and which of its states is read."""
    digest = hashlib.sha256()
    config = model.config
    digest.update(f"{config.vision_feature_layer} {config.vision_feature_select_strategy}".encode())
    shape = {key: value for key, value in config.vision_config.to_dict().items() if key not in NOT_SHAPE}
    digest.update(json.dumps(shape, sort_keys=True, default=str).encode())  # heads change no weight
    for name, tensor in sorted(model.model.vision_tower.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def _pixels_digest(pixels: Pixels) -> str:
    """What becomes of black and of white tells mean and deviation of every channel."""
    ends = []
    for colour in ("black", "white"):
        png = io.BytesIO()
        Pillow.new("RGB", (1, 1), colour).save(png, "PNG")
        ends.append(png.getvalue())
    return hashlib.sha256(pixels(ends).tobytes()).hexdigest()[:8]
