"""The projector `linear`: one linear layer, which LLaVA's format holds as two."""

# I images, P patches, C tower channels, D language model dim

import torch
from torch import Tensor, nn

from vila_ops.config.model import LinearProjector
from vila_ops.model.configuration import VilaConfig


class Linear(nn.Module):
    """One linear layer. (I, P, C) -> (I, P, D)."""

    def __init__(self, config: VilaConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)

    def forward(self, features_IPC: Tensor) -> Tensor:
        out: Tensor = self.linear(features_IPC)
        return out


def build(config: VilaConfig, choice: LinearProjector) -> Linear:
    """The layer between the widths of tower and language model."""
    return Linear(config)


def to_llava(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A model's parameters with the linear projector as LLaVA's MLP: identity activation and second layer, exact.

    `prefix` is how the names of the projector's parameters begin.
    """
    out = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
    weight, bias = state[f"{prefix}linear.weight"], state[f"{prefix}linear.bias"]
    out[f"{prefix}linear_1.weight"], out[f"{prefix}linear_1.bias"] = weight, bias
    out[f"{prefix}linear_2.weight"] = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    out[f"{prefix}linear_2.bias"] = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)
    return out


def from_llava(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The reverse of `to_llava`. Raises ValueError if the second layer is not the identity."""
    out = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
    second = state[f"{prefix}linear_2.weight"]
    if not torch.equal(second, torch.eye(len(second), dtype=second.dtype)) or state[f"{prefix}linear_2.bias"].any():
        raise ValueError("the projector's second layer is not the identity, so it is no linear projector")
    out[f"{prefix}linear.weight"] = state[f"{prefix}linear_1.weight"]
    out[f"{prefix}linear.bias"] = state[f"{prefix}linear_1.bias"]
    return out
