"""Alignment of images and captions in the language model, layer by layer; see `config.eval.Alignment`."""

# N items, L layers of the language model, T tokens, D its dimension

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from vila_ops.config.eval import Alignment
from vila_ops.eval.benchmark import LazyTokenizer, MetricValues, StatesRequest, Units
from vila_ops.eval.benchmarks.held_out.items import HeldOut, ImageItem, image_items
from vila_ops.eval.benchmarks.held_out.prompts import caption_prompt, of_condition, shown_images
from vila_ops.eval.metrics.alignment import chamfer_similarity
from vila_ops.eval.report import MetricRole
from vila_ops.eval.rows import ItemRow

REVISION = 6
NAME, UNIT = "alignment", "cosine"


def read(source: HeldOut, config: Alignment) -> tuple[ImageItem, ...]:
    """The first held-out images."""
    return image_items(source.inputs, "new")[: config.max_images]


def requests(items: Sequence[ImageItem], config: Alignment, tokenizer: LazyTokenizer) -> list[StatesRequest]:
    """The similarities of each layer for a caption after the matched and after the shuffled image."""
    return [
        StatesRequest(
            item=item.id,
            condition=condition,
            prompt=caption_prompt(tokenizer(), image),
            continuation=tokenizer().text_ids(item.caption),
            reduce=similarities,
        )
        for condition, images in shown_images(items, config.control).items()
        for item, image in zip(items, images, strict=True)
    ]


def similarities(states: NDArray[np.float64], visual: NDArray[np.int64], num_textual: int) -> list[float]:
    """Similarity of the image's tokens, at the positions `visual`, and the last tokens: (L + 1, T, D) -> L + 1."""
    return [chamfer_similarity(layer[visual], layer[-num_textual:]) for layer in states]


def score(items: Sequence[ImageItem], rows: Sequence[ItemRow], config: Alignment) -> list[Mapping[str, float]]:
    """The similarity of each layer."""
    return [{f"layer {layer}": value for layer, value in enumerate(row.response.values)} for row in rows]


def metrics(items: Sequence[ImageItem], rows: Sequence[ItemRow], config: Alignment) -> list[MetricValues]:
    """The mean over the deeper half of the layers, its margin over the shuffled image, and the mean of each layer.

    Layer 0 is what enters the language model; the last one is what its head reads.
    """
    values = []
    deep_of: dict[MetricRole, dict[str, float]] = {}
    for role, own in of_condition(rows).items():
        table = np.array([row.response.values for row in own])  # (N, L + 1)
        units, deep = Units.of(own), table[:, table.shape[1] // 2 :].mean(axis=1)
        deep_of[role] = dict(zip(units.names, deep.tolist(), strict=True))
        values.append(MetricValues(NAME, units, deep, role=role, unit=UNIT))
        values += [
            MetricValues(NAME, units, layer_values, role=role, unit=UNIT, layer=layer)
            for layer, layer_values in enumerate(table.T)
        ]
    shuffled = deep_of.get("control", {})
    if both := [row for row in of_condition(rows).get("model", []) if row.item in shuffled]:
        margins = np.array([deep_of["model"][row.item] - shuffled[row.item] for row in both])
        values.append(MetricValues(f"{NAME}_margin", Units.of(both), margins, unit=UNIT))
    return values
