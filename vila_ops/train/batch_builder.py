"""Turn packed rows into a batch of tensors on the device."""

import functools

import torch

from vila_ops.artifacts.store import content
from vila_ops.data.images import pixels
from vila_ops.data.loading.loader import stack
from vila_ops.data.loading.packing import PackedRow
from vila_ops.model import folder as model_folder
from vila_ops.model import lora
from vila_ops.model.features import FeatureCache
from vila_ops.model.vila import VilaForConditionalGeneration
from vila_ops.train.job import TrainJob
from vila_ops.train.objective import Batch
from vila_ops.train.sample_log import SampleLog


class BatchBuilder:
    """Builds micro-batches: token tensors, and either the cached features or the pixels of the images."""

    def __init__(self, job: TrainJob, model: VilaForConditionalGeneration, *, device: torch.device) -> None:
        mean, std = model_folder.normalisation(content(job.init))
        self.device, self.seed = device, job.stage.seed
        self.pixels = functools.partial(pixels, mean=mean, std=std)
        self.tower_trains = "vision_tower" in job.stage.trainable
        self.feature_cache = FeatureCache(
            model,
            self.pixels,
            root=job.feature_cache(),
            precision=job.stage.precision,
            leave_free=job.resources.storage.features_leave_free,
        )
        self.sample_log = SampleLog(job) if job.resources.train.record_samples else None

    def __call__(self, rows: list[PackedRow], *, step: int | None = None) -> Batch:
        """Return the batch of a training step's micro-batch; `step` is None in validation, which has no dropout."""
        if self.sample_log and step is not None:
            self.sample_log.write(step, rows)
        input_ids, position_ids, segment_ids, labels = (torch.from_numpy(array) for array in stack(rows))
        images = [image for row in rows for image in row.images]
        features = pixel_values = None
        if images and self.tower_trains:
            pixel_values = torch.from_numpy(self.pixels(images)).to(self.device)
        elif images:
            features = self.feature_cache(images).to(self.device)
        return Batch(
            input_ids=input_ids.to(self.device),
            position_ids=position_ids.to(self.device),
            segment_ids=segment_ids.to(self.device),
            labels=labels.to(self.device),
            features=features,
            pixel_values=pixel_values,
            draws=None if step is None else tuple(lora.draw(self.seed, step, row.keys) for row in rows),
        )
