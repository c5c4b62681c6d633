"""Features of a frozen tower, computed once for each image and cached on disk while space is left."""

# I images, P patches, C tower channels, S side in pixels

import functools
import hashlib
import io
import json
import logging
import os
import secrets
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image as Pillow
from torch import Tensor

from vila_ops.ahead import Workers
from vila_ops.model.copies import Copies
from vila_ops.model.pixels import Pixels, stacked_levels
from vila_ops.model.vila import VilaForConditionalGeneration

log = logging.getLogger(__name__)
BATCH = 16
"""Images of each pass of the tower, whose shape never changes: so an image's features depend on that image only."""
WRITES = 4
"""Passes whose features may wait to be written at the same time."""
REMEMBERED = 4096
"""Images that were written last and may have been missing when a later batch was read; more than batches ahead have."""

SUFFIX = ".features"
"""Ending of the file with an image's features."""

NOT_ARCHITECTURE = ("_name_or_path", "architectures", "dtype", "transformers_version")
"""Fields of the tower's config that do not change its features."""


@dataclass(frozen=True)
class ReadImages:
    """Images in the host's memory: the features of some, the levels of the others."""

    keys: list[str]
    """(I,), the sha256 of each image."""
    features: Tensor | None
    """(I, P, C), features that were on disk; other rows have no meaning. None: no feature was on disk."""
    levels: dict[str, Tensor]
    """Levels (S, S, 3) of each different image without features, by its key, in order."""


class FeatureCache:
    """Tower features by the sha256 of an image's bytes; each file holds the raw values, then their CRC-32.

    `read` may be called in any thread, `features` in the thread that computes.
    """

    def __init__(
        self,
        model: VilaForConditionalGeneration,
        pixels: Pixels,
        *,
        root: Path,
        precision: Literal["fp32", "bf16"] = "fp32",
        leave_free: float,
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
        self._ready: dict[str, Tensor] = {}
        """Features (P, C) on the device that were not used yet."""
        self._writer: Workers | None = None
        self._writes: dict[str, Future[None]] = {}
        """The write of each image that was computed last."""
        self._unfinished: deque[Future[None]] = deque()

    def __call__(self, images: Sequence[bytes]) -> Tensor:
        """Features (I, P, C) of encoded square images on the tower's device; computed if they are not on disk."""
        return self.features(self.read(images))

    @functools.cached_property
    def copies(self) -> Copies:
        """Copies to and from the tower's device. Used when the model is where it will compute."""
        return Copies(next(self.model.model.vision_tower.parameters()).device)

    def read(self, images: Sequence[bytes]) -> ReadImages:
        """Read the features of encoded square images from disk, and decode the images that have none there.

        Raises Pillow's error for an image that cannot be decoded.
        """
        keys = [hashlib.sha256(image).hexdigest() for image in images]
        features, missing = None, dict(zip(keys, images, strict=True))
        if any(self._path(key).exists() for key in missing):
            features = self.copies.empty(len(images), *self.shape, dtype=self.dtype)
            unread = {key for key, out in zip(keys, features, strict=True) if not self._read(key, out)}
            missing = {key: image for key, image in missing.items() if key in unread}
        decoded = stacked_levels(list(missing.values()), self.copies) if missing else ()
        return ReadImages(keys, features, dict(zip(missing, decoded, strict=True)))

    @torch.no_grad()
    def features(self, images: ReadImages, upcoming: Iterable[ReadImages] = ()) -> Tensor:
        """Features (I, P, C) of images on the tower's device; the host does not wait for them.

        A pass of the tower that they do not fill takes images of `upcoming`, the next calls, before blank ones.
        """
        self._compute({key: image for key, image in images.levels.items() if not self._is_ready(key)}, upcoming)
        if images.features is None:
            features = torch.stack([self._ready[key] for key in images.keys])
        else:
            features = self.copies.arrived(self.copies.to_device(images.features))
            for row, key in enumerate(images.keys):
                if key in images.levels:
                    features[row] = self._ready[key]
        for key in images.levels:
            del self._ready[key]
        return features

    @contextmanager
    def writing_behind(self) -> Iterator[None]:
        """Files are written by a thread inside this context, and all of them when it ends without an error."""
        with Workers(1, name="features") as self._writer:
            try:
                yield
                for write in self._unfinished:
                    write.result()
            finally:
                self._writer = None
                self._writes.clear()
                self._unfinished.clear()

    def _is_ready(self, key: str) -> bool:
        """Whether the features of an image are on the device, after they were read if they were written meanwhile."""
        if key in self._ready:
            return True
        if key not in self._writes:
            return False
        self._writes[key].result()
        out = self.copies.empty(*self.shape, dtype=self.dtype)
        if not self._read(key, out):
            return False
        self._ready[key] = self.copies.arrived(self.copies.to_device(out))
        return True

    def _compute(self, missing: dict[str, Tensor], upcoming: Iterable[ReadImages]) -> None:
        """Compute features of the levels of images, and of upcoming images in the same passes."""
        if not missing:
            return
        chosen = dict(missing)
        later = (pair for images in upcoming for pair in images.levels.items())
        while len(chosen) % BATCH and (pair := next(later, None)):
            key, image = pair
            if key not in self._ready and key not in self._writes:
                chosen[key] = image
        pairs = list(chosen.items())
        for start in range(0, len(pairs), BATCH):
            part = dict(pairs[start : start + BATCH])
            computed = self._pass(list(part.values()))
            self._ready.update(zip(part, computed, strict=True))
            self._keep(list(part), computed)

    def _pass(self, images: list[Tensor]) -> Tensor:
        """Features of at most BATCH images from their levels, in one pass with blank images to fill it."""
        copied = [self.copies.arrived(self.copies.to_device(image)) for image in images]
        blank = torch.zeros_like(copied[0])
        values = self.pixels.values(torch.stack([*copied, *[blank] * (BATCH - len(copied))]))
        features = self.model.tower_features(values)[: len(images)].to(self.dtype)
        self.num_computed += len(images)
        return features

    def _keep(self, keys: list[str], features: Tensor) -> None:
        """Write features to disk while it has space, beside the computation if there is a writer."""
        try:
            if not self._has_space():
                return
        except OSError as error:
            self._tell(error)
            return
        write = functools.partial(self._store, keys, self.copies.to_host(features))
        if self._writer is None:
            write()
            return
        future = self._writer.submit(write)
        self._unfinished.append(future)
        self._writes.update(dict.fromkeys(keys, future))
        while len(self._unfinished) > WRITES:
            self._unfinished.popleft().result()
        while len(self._writes) > REMEMBERED:
            del self._writes[next(iter(self._writes))]

    def _store(self, keys: list[str], on_host: Callable[[], Tensor]) -> None:
        try:
            for key, feature in zip(keys, on_host(), strict=True):
                self._write(key, _bytes_of(feature.contiguous()))
        except OSError as error:  # the share that stays free may be 0, and a quota is smaller than its disk
            self._tell(error)

    def _tell(self, error: OSError) -> None:
        if not self.failed:
            log.warning("%s: new features are not stored but recomputed each time (%s)", self.folder, error)
        self.failed = True

    def _write(self, key: str, raw: memoryview) -> None:
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
    return hashlib.sha256(pixels(ends).numpy().tobytes()).hexdigest()[:8]
