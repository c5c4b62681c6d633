"""Layers that keep only their inputs for the backward pass, which computes the rest anew (Chen et al. 2016,
arXiv:1604.06174).

What a layer computes does not change, nor do names and states.
"""

from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


class RecomputedLayer(nn.Module):
    """Mixed into a layer's class.

    transformers' own switch works in training mode alone, which would turn on the dropout of a pre-trained model too.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward pass. It draws from no generator of torch's: dropout here has its own draws."""
        return checkpoint(super().forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def recompute(part: nn.Module) -> None:
    """Let every layer of a tower or decoder be recompute. Raises ValueError where transformers names no layers."""
    layers = [module for module in part.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"{type(part).__name__} has no layers to recompute; set gradient_checkpointing to false")
    for layer in layers:
        kind = type(layer)
        layer.__class__ = type(kind.__name__, (RecomputedLayer, kind), {"__module__": kind.__module__})


def recomputed_layers(model: nn.Module) -> int:
    """How many layers of a model are recompute."""
    return sum(isinstance(module, RecomputedLayer) for module in model.modules())
