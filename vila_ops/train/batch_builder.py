"""Turn packed rows into a batch of tensors on the device: what the host can do first, then the rest."""

# I images, S side in pixels

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from vila_ops.artifacts.store import content
from vila_ops.data.images import DAMAGE
from vila_ops.data.loading.loader import stack
from vila_ops.data.loading.packing import PackedRow, images_of
from vila_ops.data.shards import CorruptShard
from vila_ops.model import folder as model_folder
from vila_ops.model import lora
from vila_ops.model.copies import Copies
from vila_ops.model.features import FeatureCache, ReadImages
from vila_ops.model.pixels import Pixels, levels, stacked_levels
from vila_ops.model.vila import VilaForConditionalGeneration
from vila_ops.train.job import TrainJob
from vila_ops.train.objective import Batch, copied
from vila_ops.train.profile import span


@dataclass
class HostBatch:
    """A micro-batch in the host's memory, and what of it is on its way to the device."""

    rows: list[PackedRow]
    batch: Batch
    """The batch without its images."""
    images: ReadImages | None
    """Images for a frozen tower."""
    levels: Tensor | None
    """(I, S, S, 3), images for a tower that trains."""
    sent: tuple[Batch, Tensor | None] | None = None
    """Batch and levels on the device, as soon as their copy has begun."""


class BatchBuilder:
    """Builds micro-batches: tokens, and either features of a frozen tower or the pixels of the images.

    `on_host` may be called in any thread, the other methods in the thread that computes.
    """

    def __init__(self, job: TrainJob, model: VilaForConditionalGeneration, *, device: torch.device) -> None:
        mean, std = model_folder.normalisation(content(job.init))
        self.device, self.seed, self.model = device, job.stage.seed, model
        self.pixels = Pixels(mean, std)
        self.tower_trains = "vision_tower" in job.stage.trainable
        self.copies = Copies(device)
        self.feature_cache = FeatureCache(
            model,
            self.pixels,
            root=job.feature_cache(),
            precision=job.stage.precision,
            leave_free=job.resources.storage.features_leave_free,
        )

    def __call__(self, rows: list[PackedRow], *, step: int | None = None) -> Batch:
        """Return the batch of a training step's micro-batch; `step` is None in validation, which has no dropout."""
        return self.on_device(self.on_host(rows, step=step))

    def on_host(self, rows: list[PackedRow], *, step: int | None, any_images: bool | None = None) -> HostBatch:
        """Return a batch in the host's memory, with features from disk and decoded images.

        `any_images` says whether any rank has images in this pass; None: there is no other rank. Raises CorruptShard,
        which names the sample, for an image that cannot be decoded.
        """
        images = images_of(rows)
        input_ids, position_ids, segment_ids, labels = (torch.from_numpy(array) for array in stack(rows))
        batch = Batch.of_tokens(
            self.model,
            input_ids=input_ids,
            position_ids=position_ids,
            segment_ids=segment_ids,
            labels=labels,
            any_images=bool(images) if any_images is None else any_images,
        )
        draws = None if step is None else tuple(lora.draw(self.seed, step, row.keys) for row in rows)
        batch = dataclasses.replace(copied(batch, self.copies.pinned), draws=draws)
        try:
            if not images:
                return HostBatch(rows, batch, None, None)
            if self.tower_trains:
                return HostBatch(rows, batch, None, stacked_levels(images, self.copies))
            return HostBatch(rows, batch, self.feature_cache.read(images), None)
        except DAMAGE as error:
            raise _named(rows, error) from error

    def send(self, host: HostBatch) -> tuple[Batch, Tensor | None]:
        """Begin to copy tokens and pixels to the device, beside its computation."""
        with span("copies"):
            if host.sent is None:
                host.sent = copied((host.batch, host.levels), self.copies.to_device)
            return host.sent

    def on_device(self, host: HostBatch, upcoming: Iterable[HostBatch] = ()) -> Batch:
        """Return the batch on the device; `upcoming` are the batches after it."""
        batch: Batch
        squares: Tensor | None
        batch, squares = copied(self.send(host), self.copies.arrived)
        if squares is not None:
            return dataclasses.replace(batch, pixel_values=self.pixels.values(squares))
        if host.images is None:
            return batch
        later = (other.images for other in upcoming if other.images is not None)
        with span("tower"):
            return dataclasses.replace(batch, features=self.feature_cache.features(host.images, later))


def _named(rows: list[PackedRow], error: Exception) -> Exception:
    """The error for images of which one cannot be decoded; the same error if all can."""
    for row in rows:
        for key, image in zip(row.keys_of_images(), row.images, strict=True):
            try:
                levels(image)
            except DAMAGE as damage:
                return CorruptShard(
                    f"an image of sample {key!r} cannot be decoded ({damage}), though its shard is as it was sealed: "
                    f"this Pillow may lack the format, or the dataset was prepared with a fault; check with "
                    f"`vila-ops data show`, or quarantine the sample"
                )
    return error
