"""Layers that compute with another form of their weight."""

from torch import nn


def replace_weight(layer: nn.Module, base: type[nn.Module], mixin: type[nn.Module]) -> None:
    """Take a layer's numbers away and mix in what computes in place of `base`; what its class adds to that, it keeps.

    The weight stays, without a row: classes read its dtype and device.
    """
    layer.weight = nn.Parameter(layer.get_parameter("weight").detach()[:0].clone(), requires_grad=False)
    kind = type(layer)
    layer.__class__ = mixin if kind is base else type(f"{mixin.__name__}{kind.__name__}", (kind, mixin), {})
