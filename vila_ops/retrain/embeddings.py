"""Embeddings of samples by a model: images by its tower, texts by the embedding table of its language model."""

# S samples, I images, C tower channels, D language model dim

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vila_ops.artifacts.kinds import Checkpoint
from vila_ops.artifacts.store import content
from vila_ops.config import Resources
from vila_ops.data.shards import Sample

Vectors = NDArray[np.float64]


class Embedder:
    """The tower and the embedding table of a sealed model."""

    def __init__(self, model: Checkpoint, resources: Resources) -> None:
        from vila_ops.generate.engine import EngineOptions  # heavy: torch
        from vila_ops.generate.torch_engine.loaded_model import read_model

        options = EngineOptions(
            device=resources.device,
            threads=resources.evaluate.threads_per_worker,
            feature_root=resources.storage.scratch() / "features",
            features_leave_free=resources.storage.features_leave_free,
        )
        self._loaded = read_model(content(model), options)

    def images(self, samples: Sequence[Sample]) -> tuple[Vectors, list[int]]:
        """Mean features over patches (I, C) of all images, and for each the number of its sample."""
        pairs = [(number, image) for number, sample in enumerate(samples) for image in sample.images]
        if not pairs:
            return np.empty((0, 0)), []
        return self._loaded.image_features([image for _, image in pairs]), [number for number, _ in pairs]

    def texts(self, samples: Sequence[Sample]) -> Vectors:
        """Mean input embeddings (S, D) of the tokens that stand for no image."""
        table = self._loaded.model.get_input_embeddings().weight.detach().float().cpu().double().numpy()
        image = self._loaded.tokenizer.image_id
        means = [table[[one for one in sample.input_ids if one != image] or [image]].mean(axis=0) for sample in samples]
        return np.stack(means)
