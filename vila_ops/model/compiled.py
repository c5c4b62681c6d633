"""Layers of a language model compiled by torch.compile: one graph for all of them, as their weights are its inputs."""

from typing import Any

import torch
from torch import nn

from vila_ops.model.layer_classes import mixed


class CompiledLayer(nn.Module):
    """Mixin for a layer's class whose forward pass is compiled. Parameter names and state dict do not change."""

    compiled: Any
    """The compiled forward pass of the layer's class. It is called with the layer, so that all layers share it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's forward pass."""
        return self.compiled(self, *args, **kwargs)


def compile_layers(decoder: nn.Module, *, backend: str = "inductor") -> None:
    """Compile every layer of a decoder, in place; layers that recompute have to do so before this.

    A size that differs from the first one is compiled a second time, then for every size.
    """
    layers: Any = decoder.layers
    compiled: dict[type[nn.Module], Any] = {}
    for layer in layers:
        kind = type(layer)
        if kind not in compiled:
            compiled[kind] = torch.compile(kind.forward, backend=backend)
        layer.compiled, layer.__class__ = compiled[kind], mixed(CompiledLayer, kind)


def compiled_layers(model: nn.Module) -> int:
    """Number of layers of a model that are compiled."""
    return sum(isinstance(module, CompiledLayer) for module in model.modules())
