"""Streams of embeddings compared: the images and the texts of samples before and now, one row for each object."""

from typing import Any

import numpy as np

from vila_ops.artifacts.kinds import Checkpoint, Dataset
from vila_ops.config import Resources
from vila_ops.config.retrain import DriftRules
from vila_ops.data.shards import Sample, samples_of
from vila_ops.retrain.drift import Drift, compare, unit_means
from vila_ops.retrain.embeddings import Embedder

DatasetRows = tuple[Dataset, list[dict[str, Any]]]
"""A dataset, and the rows of its index to draw from."""


class Comparisons:
    """Comparisons of samples by the embeddings of one model, which is loaded at the first."""

    def __init__(self, model: Checkpoint, resources: Resources, rules: DriftRules, level: float) -> None:
        self._model, self._resources, self._rules, self._level = model, resources, rules, level
        self._embedder: Embedder | None = None

    def streams(self, name: str, before: DatasetRows, now: DatasetRows) -> list[Drift]:
        """Images and texts of both sides compared; what has too few units is left out."""
        if not before[1] or not now[1]:
            return []
        self._embedder = self._embedder or Embedder(self._model, self._resources)
        sides = [self._embedded(*before), self._embedded(*now)]
        made = []
        for place, kind in enumerate(("images", "texts")):
            rng = np.random.default_rng(int(f"{before[0].digest}{now[0].digest}"[:16], 16) + place)
            limits = {"level": self._level, "min_effect": self._rules.min_effect}
            if (one := compare(f"{name}, {kind}", sides[0][place], sides[1][place], **limits, rng=rng)) is not None:
                made.append(one)
        return made

    def _embedded(self, dataset: Dataset, rows: list[dict[str, Any]]) -> tuple[Any, Any]:
        """One row for each object: means of its images' features, and of its texts' embeddings."""
        assert self._embedder is not None
        rng = np.random.default_rng(int(dataset.digest[:16], 16))
        count = min(self._rules.max_samples, len(rows))
        drawn = [rows[place] for place in sorted(rng.choice(len(rows), count, replace=False))]
        samples: list[Sample] = list(samples_of(dataset, drawn))
        features, owners = self._embedder.images(samples)
        units = [one.object for one in samples]
        images = unit_means(features, [units[owner] for owner in owners]) if owners else features
        return images, unit_means(self._embedder.texts(samples), units)
