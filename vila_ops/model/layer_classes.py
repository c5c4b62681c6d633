"""Layers that get another forward pass by a change of their class; layers of one class stay of one class."""

from torch import nn

_made: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def mixed(mixin: type[nn.Module], kind: type[nn.Module]) -> type[nn.Module]:
    """The class of a layer with the forward pass of a mixin around its own; the same class for the same arguments."""
    if (mixin, kind) not in _made:
        _made[mixin, kind] = type(kind.__name__, (mixin, kind), {"__module__": kind.__module__})
    return _made[mixin, kind]
