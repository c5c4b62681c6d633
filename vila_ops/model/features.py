"""Features of a frozen tower, computed once for each image and cached on disk while space is left."""

# I images, P patches, C tower channels, S side in pixels

import hashlib
import io
import json
import logging
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as Pillow
from torch import Tensor

from vila_ops.model.vila import VilaForConditionalGeneration

log = logging.getLogger(__name__)
BATCH = 16
"""Images per forward pass of the tower, padded with blank ones: so an image's features depend on that image only."""

SUFFIX = ".features"
"""Ending of the file with an image's features."""

NOT_ARCHITECTURE = ("_name_or_path", "architectures", "dtype", "transformers_version")
"""Fields of the tower's config that do not change its features."""

Pixels = Callable[[Sequence[bytes]], NDArray[np.float32]]
"""Encoded square images -> pixel values (I, 3, S, S)."""


class FeatureCache:
    """Tower features by the sha256 of an image's bytes; each file holds the raw values, then their CRC-32."""

    def __init__(
        self,
        model: VilaForConditionalGeneration,
        pixels: Pixels,
        *,
        root: Path,
        precision: Literal["fp32", "bf16"] = "fp32",
        leave_free: float = 0.1,
    ) -> None:
        """`precision` is that of the tower's computation and of the stored features.

        `leave_free` is the share of the disk under `root` that stays free: below it, features are computed and not
        stored.
        """
        self.model = model
        self.pixels = pixels
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.shape = (model.config.grid() ** 2, model.config.vision_config.hidden_size)
        self.num_computed = 0
        """Images that went through the tower so far."""
        self.root, self.leave_free = root, leave_free
        self.full = self.failed = False
        self.folder = root / f"{tower_digest(model)}-{_pixels_digest(pixels)}-{precision}"

    @torch.no_grad()
    def __call__(self, images: Sequence[bytes]) -> Tensor:
        """Features (I, P, C) of encoded square images, in their order; computed if they are not on disk."""
        keys = [hashlib.sha256(image).hexdigest() for image in images]
        features = torch.empty(len(images), *self.shape, dtype=self.dtype)
        missing = [index for index, key in enumerate(keys) if not self._read(key, features[index])]
        new = list({keys[index]: images[index] for index in missing}.items())
        for start in range(0, len(new), BATCH):
            computed = self._compute(new[start : start + BATCH])
            for index in missing:
                if keys[index] in computed:
                    features[index] = computed[keys[index]]
        return features

    def _compute(self, batch: list[tuple[str, bytes]]) -> dict[str, Tensor]:
        values = torch.from_numpy(self.pixels([image for _, image in batch]))
        padded = torch.cat([values, values.new_zeros(BATCH - len(values), *values.shape[1:])])
        device = next(self.model.model.vision_tower.parameters()).device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            features = self.model.tower_features(padded.to(device)).to("cpu", self.dtype)
        computed = {key: feature for (key, _), feature in zip(batch, features, strict=False)}
        self.num_computed += len(computed)
        try:
            for key, feature in computed.items() if self._has_space() else ():
                self._store(key, _bytes_of(feature.contiguous()))
        except OSError as error:  # the share that stays free may be 0, and a quota is smaller than its disk
            if not self.failed:
                log.warning("%s: new features are not stored but recomputed each time (%s)", self.folder, error)
            self.failed = True
        return computed

    def _store(self, key: str, raw: memoryview) -> None:
        path = self._path(key)
        draft = path.with_name(f".{key}-{secrets.token_hex(4)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(raw.tobytes() + zlib.crc32(raw).to_bytes(4, "little"))
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)

    def _has_space(self) -> bool:
        self.root.mkdir(parents=True, exist_ok=True)
        disk = shutil.disk_usage(self.root)
        was_full, self.full = self.full, disk.free < self.leave_free * disk.total
        if self.full and not was_full:
            log.warning(
                "%s has %.0f GB free of %.0f, less than the share of %g that stays free; new features are not stored "
                "but recomputed each time (features_leave_free of the resources)",
                self.root, disk.free / 1e9, disk.total / 1e9, self.leave_free,
            )  # fmt: skip
        return not self.full

    def _read(self, key: str, out: Tensor) -> bool:
        """Read features from disk into `out`; False if the file is missing, truncated or damaged."""
        raw = _bytes_of(out)
        try:
            with self._path(key).open("rb", buffering=0) as file:
                whole = file.readinto(raw) == len(raw)
                return whole and file.read(5) == zlib.crc32(raw).to_bytes(4, "little")
        except OSError:
            return False

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}{SUFFIX}"


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor, as bytes because numpy has no bf16."""
    return tensor.view(torch.uint8).flatten().numpy().data


def tower_digest(model: VilaForConditionalGeneration) -> str:
    """sha256 of the tower's weights and config and of the hidden state that is read."""
    digest = hashlib.sha256()
    config = model.config
    digest.update(f"{config.vision_feature_layer} {config.vision_feature_select_strategy}".encode())
    shape = {key: value for key, value in config.vision_config.to_dict().items() if key not in NOT_ARCHITECTURE}
    digest.update(json.dumps(shape, sort_keys=True, default=str).encode())  # the number of heads shows in no weight
    for name, tensor in sorted(model.model.vision_tower.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def _pixels_digest(pixels: Pixels) -> str:
    """Digest of the pixel values of black and white, which determine mean and deviation of every channel."""
    ends = []
    for colour in ("black", "white"):
        png = io.BytesIO()
        Pillow.new("RGB", (1, 1), colour).save(png, "PNG")
        ends.append(png.getvalue())
    return hashlib.sha256(pixels(ends).tobytes()).hexdigest()[:8]
