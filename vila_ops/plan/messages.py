"""Sizes of the messages by which ZeRO reduces gradients and gathers weights, from the shapes of a model."""

from typing import NamedTuple

from vila_ops.model.trainable import EXPERT, LORA
from vila_ops.model.vila import VilaForConditionalGeneration
from vila_ops.plan.shapes import Shapes, numbers

LEAST = 2**22
"""Elements of the shortest message. Below some MiB, latency takes longer than the transfer."""
MOST = 500_000_000
"""DeepSpeed's default `reduce_bucket_size`, in elements."""


class MessageSizes(NamedTuple):
    """Sizes in elements. Each message is a layer of the decoder, so that it moves while the next layer computes."""

    reduce: int
    """Gradients that are collected before they are reduced."""
    gather: int
    """Weights that are gathered ahead."""


def message_sizes(layer: int) -> MessageSizes:
    """Return the sizes for a decoder with `layer` weights in each layer."""
    size = min(MOST, max(LEAST, layer))
    return MessageSizes(reduce=size, gather=size)


def sizes_by_shapes(shapes: Shapes) -> MessageSizes:
    """Return the sizes for a model of these shapes."""
    return message_sizes(numbers(shapes.decoder.matrices))


def sizes_of(model: VilaForConditionalGeneration) -> MessageSizes:
    """Return the sizes for a model, from its weights."""
    own = [
        parameter.numel()
        for name, parameter in model.model.language_model.layers[0].named_parameters()
        if parameter.ndim >= 2 and LORA not in name and EXPERT not in name
    ]
    return message_sizes(sum(own))
