"""The projectors: patch features of the tower to token embeddings of the language model.

Tokens of an image, by its side / the patch's in pixels:

| | 224/14 | 336/14 | 384/14 | 448/14 |
|---|---|---|---|---|
| linear, MLP, transformer | 256 | 576 | 729 | 1024 |
| merged 2 x 2 | 64 | 144 | 196 | 256 |
| merged 3 x 3 | 36 | 64 | 81 | 121 |
"""

# I images, P patches, C tower channels, F = factor^2 C, Q tokens after the projector, D language model dim

from collections import OrderedDict
from itertools import pairwise
from typing import Literal, assert_never

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from vila_ops.config.model import DownsampleProjector, LinearProjector, MlpProjector, TransformerProjector
from vila_ops.model.configuration import VilaConfig
from vila_ops.model.seeds import generator


class Downsample(nn.Sequential):
    """factor x factor neighbours on channels, then linear layers. (I, P, C) -> (I, Q, D).

    Widths by depth: 1, F to D. 2, norm, F to D to D. 3, norm, F to factor C, norm, to D to D; with GELU between linear
    layers. Depth 2 is mlp_downsample and mlp_downsample_2x2_fix of NVlabs/VILA, depth 3 mlp_downsample_3x3_fix.
    P must be a square; a side that factor does not divide is padded with zeros.
    """

    def __init__(self, config: VilaConfig, choice: DownsampleProjector) -> None:
        channels, dim = config.vision_config.hidden_size, config.text_config.hidden_size
        wide, narrow = channels * choice.factor**2, channels * choice.factor
        layers: dict[str, nn.Module]
        match choice.depth:
            case 1:
                layers = {"linear_1": nn.Linear(wide, dim)}
            case 2:
                layers = {
                    "norm": nn.LayerNorm(wide), "linear_1": nn.Linear(wide, dim),
                    "act": nn.GELU(), "linear_2": nn.Linear(dim, dim),
                }  # fmt: skip
            case 3:
                layers = {
                    "norm": nn.LayerNorm(wide), "linear_1": nn.Linear(wide, narrow),
                    "act": nn.GELU(), "norm_2": nn.LayerNorm(narrow), "linear_2": nn.Linear(narrow, dim),
                    "act_2": nn.GELU(), "linear_3": nn.Linear(dim, dim),
                }  # fmt: skip
            case _:
                assert_never(choice.depth)
        super().__init__(OrderedDict(layers))
        self.factor, self.token_order = choice.factor, choice.token_order

    def forward(self, features_IPC: Tensor) -> Tensor:
        hidden = merge_patches(features_IPC, self.factor, token_order=self.token_order)
        for layer in self:
            hidden = layer(hidden)
        return hidden


class Transformer(nn.Module):
    """Pre-norm transformer blocks over the patches of one image, all seeing all. (I, P, C) -> (I, P, D).

    The blocks are CLIP's, with GELU and 4 C inside; a norm and a linear layer follow them.
    """

    def __init__(self, config: VilaConfig, choice: TransformerProjector) -> None:
        super().__init__()
        channels = config.vision_config.hidden_size
        if channels % choice.num_heads:
            raise ValueError(
                f"the tower's {channels} channels do not divide into {choice.num_heads} heads; "
                f"choose num_heads of the projector to divide {channels}"
            )
        block = CLIPVisionConfig(
            hidden_size=channels,
            intermediate_size=4 * channels,
            num_attention_heads=choice.num_heads,
            hidden_act="gelu",
            attn_implementation="sdpa",
        )
        self.blocks = nn.ModuleList([CLIPEncoderLayer(block) for _ in range(choice.num_layers)])
        self.norm = nn.LayerNorm(channels)
        self.out = nn.Linear(channels, config.text_config.hidden_size)

    def forward(self, features_IPC: Tensor) -> Tensor:
        for block in self.blocks:
            features_IPC = block(features_IPC, attention_mask=None)
        out: Tensor = self.out(self.norm(features_IPC))
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
        case TransformerProjector() as choice:
            return Transformer(config, choice)
        case DownsampleProjector() as choice:
            return Downsample(config, choice)
        case other:
            assert_never(other)


@torch.no_grad()
def initialise(projector: nn.Module, *, std: float, seed: int) -> None:
    """Draw fresh weights as transformers does (normal with that deviation; biases 0, norms 1), in place.

    Each matrix has a generator of its own, seeded by its name. Raises ValueError for a parameter of no linear layer
    or norm.
    """
    begun: set[str] = set()
    for name, module in projector.named_modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(0, std, generator=generator(seed, f"multi_modal_projector.{name}"))
        elif isinstance(module, nn.LayerNorm):
            module.weight.fill_(1)
        else:
            continue
        if module.bias is not None:
            module.bias.zero_()
        begun |= {f"{name}.{own}" for own, _ in module.named_parameters()}
    if left := sorted({name for name, _ in projector.named_parameters()} - begun):
        raise ValueError(f"the projector's parameters {left[:3]} are of no linear layer or norm; draw them here too")


def merge_patches(features_IPC: Tensor, factor: int, *, token_order: Literal["rows", "columns"] = "rows") -> Tensor:
    """factor x factor blocks of a square grid on the channel axis: (I, P, C) -> (I, ceil(sqrt P / factor)^2, F).

    A block's patches follow each other row by row on the channels. The blocks do so as tokens, or, in the order
    `columns`, column by column: VILA-1.5's checkpoints learnt that, since its code gave the grid back transposed.
    """
    images, patches, channels = features_IPC.shape
    side = round(patches**0.5)
    if side * side != patches:
        raise ValueError(f"{patches} patches are not a square grid, which a downsampling projector needs")
    grid = features_IPC.view(images, side, side, channels)
    pad = -side % factor
    grid = nn.functional.pad(grid, (0, 0, 0, pad, 0, pad))
    small = (side + pad) // factor
    blocks = grid.view(images, small, factor, small, factor, channels).transpose(2, 3)
    if token_order == "columns":
        blocks = blocks.transpose(1, 2)
    return blocks.reshape(images, small * small, factor * factor * channels)


@torch.no_grad()
def fit_to(projector: nn.Module, features_IPC: Tensor, embedding_std: float) -> None:
    """Scale a fresh projector to what it will see: centred, unit inputs; outputs as wide as twice the embeddings.

    A random projector's outputs are far off the embeddings' scale, which costs the first steps of align (measured).
    Inputs are left alone where a norm stands before the layers, or one layer is all there is.
    """
    layers = [module for module in projector.modules() if isinstance(module, nn.Linear)]
    first, last = layers[0], layers[-1]
    if isinstance(projector, LlavaMultiModalProjector | Mlp):
        flat = features_IPC.flatten(0, 1).float()
        mean, std = flat.mean(0), flat.std(0).clamp_min(1e-4)
        first.weight.div_(std)
        first.bias.sub_(first.weight @ mean)
    out = projector(features_IPC.float())
    scale = 2 * embedding_std / out.std()
    last.weight.mul_(scale)
    last.bias.mul_(scale)
