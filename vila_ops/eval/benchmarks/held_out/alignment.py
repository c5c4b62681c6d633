"""Alignment of images and captions in the language model, layer by layer; see `config.eval.Alignment`."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vila_ops.config.eval import Alignment
from vila_ops.eval.metrics.alignment import chamfer_similarity
from vila_ops.eval.runner import BenchmarkRunner, Metric, Role
from vila_ops.generate.engine import hidden_states_of

NAME, UNIT = "alignment", "cosine"


def alignment(bench: BenchmarkRunner, config: Alignment) -> tuple[list[Metric], list[dict[str, Any]]]:
    """The mean over the deeper half of the layers, and the curve: a value with its interval for each role and layer.

    Layer 0 are the embeddings that enter the language model; the last one is what its head reads.
    """
    images = bench.items.images[: config.max_images]
    own = _similarities(bench, [(p.image, p.caption) for p in images])
    measured: list[tuple[Role, NDArray[np.float64]]] = [("model", own)]
    if config.control == "shuffled":
        control = _similarities(bench, [(p.other_image, p.caption) for p in images])
        measured.append(("control", control))
    objects = bench.objects[: len(images)]
    metrics = [
        bench.metric(NAME, role, _deep(table), statistic="mean", unit=UNIT, clusters=objects)
        for role, table in measured
    ]
    if config.control == "shuffled":
        metrics.append(bench.gap(NAME, (_deep(own), _deep(control)), statistic="mean", unit=UNIT, clusters=objects))
    curve = []
    for role, table in measured:
        for layer, values in enumerate(table.T):
            found = bench.metric(NAME, role, values, statistic="mean", unit=UNIT, clusters=objects)
            curve.append(
                {"name": NAME, "role": role, "layer": layer, "value": found.value, "low": found.low, "high": found.high}
            )
    return metrics, curve


def _similarities(bench: BenchmarkRunner, shown: list[tuple[bytes, str]]) -> NDArray[np.float64]:
    """(images, layers + 1): similarity of an image's tokens and its caption's, in the format of the pairs."""
    image_id = bench.generator.tokenizer.image_id
    rows = []
    for image, caption in shown:
        prompt = bench.caption_prompt(image)
        text = bench.generator.tokenizer.text_ids(caption)
        states = hidden_states_of(bench.generator, prompt, text)
        visual = np.flatnonzero(np.asarray(prompt.input_ids) == image_id)
        rows.append([chamfer_similarity(layer[visual], layer[-len(text) :]) for layer in states])
    return np.array(rows)


def _deep(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of each row over the deeper half of the layers."""
    half: NDArray[np.float64] = table[:, table.shape[1] // 2 :].mean(axis=1)
    return half
