"""Alignment of images and captions in the language model, layer by layer; see `config.eval.Alignment`."""

# N items, L layers of the language model, T tokens, D its dimension

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vila_ops.config.eval import Alignment
from vila_ops.eval.benchmark import Aggregate, EvalInputs, Intervals, Scored, StatesRequest, tables
from vila_ops.eval.benchmarks.held_out.items import ImageItem, image_items
from vila_ops.eval.benchmarks.held_out.prompts import ROLES, caption_prompt, shown_images
from vila_ops.eval.metrics.alignment import chamfer_similarity
from vila_ops.eval.report import ItemScore, LayerPoint
from vila_ops.eval.statistics import FloatArray

if TYPE_CHECKING:
    from vila_ops.data.text.conversation import Tokenizer

REVISION = 3
NAME, UNIT = "alignment", "cosine"


def items(inputs: EvalInputs, config: Alignment, tokenizer: "Tokenizer") -> tuple[ImageItem, ...]:
    """The first held-out images."""
    return image_items(inputs)[: config.max_images]


def requests(items: Sequence[ImageItem], config: Alignment, tokenizer: "Tokenizer") -> dict[str, list[StatesRequest]]:
    """The similarities of each layer for a caption after the matched and after the shuffled image."""
    captions = [tokenizer.text_ids(item.caption) for item in items]
    by_condition = {}
    for condition, images in shown_images(items, config.control).items():
        prompts = [caption_prompt(tokenizer, image) for image in images]
        by_condition[condition] = [
            StatesRequest(
                prompt,
                caption,
                reduce=partial(
                    _similarities,
                    visual=np.flatnonzero(np.asarray(prompt.input_ids) == tokenizer.image_id),
                    num_textual=len(caption),
                ),
            )
            for prompt, caption in zip(prompts, captions, strict=True)
        ]
    return by_condition


def score(items: Sequence[ImageItem], config: Alignment, responses: Mapping[str, Sequence[list[float]]]) -> Scored:
    """The similarity of each layer."""
    return Scored(
        tuple(
            ItemScore(
                item=item.key,
                cluster=item.object,
                scores={
                    ROLES[condition]: {f"layer {layer}": value for layer, value in enumerate(given[number])}
                    for condition, given in responses.items()
                },
            )
            for number, item in enumerate(items)
        )
    )


def aggregate(scores: Sequence[ItemScore], config: Alignment, intervals: Intervals) -> Aggregate:
    """The mean over the deeper half of the layers, its gap to shuffled images, and the mean of each layer.

    Layer 0 is what enters the language model; the last one is what its head reads.
    """
    by_role = tables(scores)
    deep = {role: _mean_of_deeper_half(similarities) for role, similarities in by_role.items()}
    metrics = [intervals.metric(NAME, role, values, statistic="mean", unit=UNIT) for role, values in deep.items()]
    if "control" in deep:
        metrics.append(intervals.gap(NAME, deep["model"], deep["control"], statistic="mean", unit=UNIT))
    layers = []
    for role, similarities in by_role.items():
        for layer, values in enumerate(similarities.T):
            mean = intervals.metric(NAME, role, values, statistic="mean", unit=UNIT)
            layers.append(LayerPoint(name=NAME, role=role, layer=layer, value=mean.value, low=mean.low, high=mean.high))
    return Aggregate(tuple(metrics), tuple(layers))


def _similarities(states: NDArray[np.float64], *, visual: NDArray[np.int64], num_textual: int) -> list[float]:
    """Similarity of the image's tokens, at the positions `visual`, and the last tokens: (L + 1, T, D) -> L + 1."""
    return [chamfer_similarity(layer[visual], layer[-num_textual:]) for layer in states]


def _mean_of_deeper_half(similarities: FloatArray) -> FloatArray:
    """(N, L + 1) -> (N,)."""
    means: FloatArray = similarities[:, similarities.shape[1] // 2 :].mean(axis=1)
    return means
