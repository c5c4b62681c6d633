"""The projectors: patch features of the tower to token embeddings of the language model."""

# I images, P patches, C tower channels, Q tokens after the projector, D language model dim

from itertools import pairwise
from typing import assert_never

import torch
from torch import Tensor, nn
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from vila_ops.config.model import DownsampleProjector, LinearProjector, MlpProjector, TransformerProjector
from vila_ops.model.configuration import VilaConfig


class Downsample(nn.Module):
    """factor x factor neighbours on channels, layer norm, linear, GELU, linear. (I, P, C) -> (I, Q, D).

    P must be a square; an odd side is padded with zeros (VILA-1.5's mlp_downsample, tokens in row order).
    """

    def __init__(self, config: VilaConfig, choice: DownsampleProjector) -> None:
        super().__init__()
        self.factor = choice.factor
        wide = config.vision_config.hidden_size * self.factor**2
        dim = config.text_config.hidden_size
        self.norm = nn.LayerNorm(wide)
        self.linear_1 = nn.Linear(wide, dim)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, features_IPC: Tensor) -> Tensor:
        merged: Tensor = self.norm(merge_patches(features_IPC, self.factor))
        out: Tensor = self.linear_2(self.act(self.linear_1(merged)))
        return out


class Linear(nn.Module):
    """One linear layer. (I, P, C) -> (I, P, D)."""

    def __init__(self, config: VilaConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)

    def forward(self, features_IPC: Tensor) -> Tensor:
        out: Tensor = self.linear(features_IPC)
        return out


class Mlp(nn.Sequential):
    """`depth` linear layers with GELU between them. (I, P, C) -> (I, P, D)."""

    def __init__(self, config: VilaConfig, *, depth: int) -> None:
        dim = config.text_config.hidden_size
        widths = [config.vision_config.hidden_size, *[dim] * depth]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.GELU(), nn.Linear(before, after)]
        super().__init__(*layers[1:])


def build_projector(config: VilaConfig) -> nn.Module:
    """The projector that a config names."""
    match config.projector_choice():
        case LinearProjector():
            return Linear(config)
        case MlpProjector(depth=2):
            stock: nn.Module = LlavaMultiModalProjector(config)
            return stock
        case MlpProjector(depth=depth):
            return Mlp(config, depth=depth)
        case TransformerProjector():
            raise NotImplementedError
        case DownsampleProjector() as choice:
            return Downsample(config, choice)
        case other:
            assert_never(other)


def merge_patches(features_IPC: Tensor, factor: int) -> Tensor:
    """factor x factor blocks of a square grid on the channel axis: (I, P, C) -> (I, ceil(sqrt P / factor)^2, C f f)."""
    images, patches, channels = features_IPC.shape
    side = round(patches**0.5)
    if side * side != patches:
        raise ValueError(f"{patches} patches are not a square grid, which a downsampling projector needs")
    grid = features_IPC.view(images, side, side, channels)
    pad = -side % factor
    grid = nn.functional.pad(grid, (0, 0, 0, pad, 0, pad))
    small = (side + pad) // factor
    blocks = grid.view(images, small, factor, small, factor, channels).transpose(2, 3)
    return blocks.reshape(images, small * small, factor * factor * channels)


@torch.no_grad()
def fit_to(projector: nn.Module, features_IPC: Tensor, embedding_std: float) -> None:
    """Scale a fresh projector to what it will see: centred, unit inputs; outputs as wide as twice the embeddings.

    A random projector's outputs are far off the embeddings' scale, which costs the first steps of align (measured).
    """
    layers = [module for module in projector.modules() if isinstance(module, nn.Linear)]
    first, last = layers[0], layers[-1]
    if not isinstance(projector, Downsample):  # its layer norm centres already
        flat = features_IPC.flatten(0, 1).float()
        mean, std = flat.mean(0), flat.std(0).clamp_min(1e-4)
        if first is not last:
            first.weight.div_(std)
            first.bias.sub_(first.weight @ mean)
    out = projector(features_IPC.float())
    scale = 2 * embedding_std / out.std()
    last.weight.mul_(scale)
    last.bias.mul_(scale)
