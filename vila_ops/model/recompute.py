"""Gradient checkpointing: layers keep their inputs only, and the backward pass recomputes the rest.

Chen et al. 2016, arXiv:1604.06174. A layer's outputs, parameter names and state dict do not change.
"""

from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from vila_ops.model.layer_classes import mixed


class RecomputedLayer(nn.Module):
    """Mixin for a layer's class that recomputes its forward pass.

    transformers' own switch works in training mode only, which would turn on the dropout of a pre-trained model too.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's forward pass. No generator state is kept: dropout here seeds its own generators (see lora)."""
        return checkpoint(super().forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def recompute(component: nn.Module) -> None:
    """Make every layer of a tower or decoder recompute, in place. Raises ValueError if it has no such layers."""
    layers = [module for module in component.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"{type(component).__name__} has no layers to recompute; set gradient_checkpointing to false")
    for layer in layers:
        layer.__class__ = mixed(RecomputedLayer, type(layer))


def recomputed_layers(model: nn.Module) -> int:
    """Number of layers of a model that recompute."""
    return sum(isinstance(module, RecomputedLayer) for module in model.modules())
