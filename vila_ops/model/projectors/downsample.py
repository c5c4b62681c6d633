"""The projector `mlp_downsample`: neighbouring patches merged into one token, then linear layers."""

# I images, P patches, C tower channels, F = factor^2 C, Q tokens after the projector, D language model dim

from collections import OrderedDict
from typing import Literal, assert_never

from torch import Tensor, nn

from vila_ops.config.model import DownsampleProjector
from vila_ops.model.configuration import VilaConfig


class Downsample(nn.Sequential):
    """factor x factor neighbouring patches concatenated on channels, then linear layers. (I, P, C) -> (I, Q, D).

    Layers by depth, with GELU between linear layers: 1, F to D. 2, norm, F to D, D to D. 3, norm, F to factor * C,
    norm, factor * C to D, D to D. Depth 2 is mlp_downsample and mlp_downsample_2x2_fix of NVlabs/VILA, depth 3 is
    mlp_downsample_3x3_fix. P must be a square; a side that factor does not divide is padded with zeros.
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


def build(config: VilaConfig, choice: DownsampleProjector) -> Downsample:
    """The layers between the widths of tower and language model."""
    return Downsample(config, choice)


def merge_patches(features_IPC: Tensor, factor: int, *, token_order: Literal["rows", "columns"] = "rows") -> Tensor:
    """factor x factor blocks of a square grid on the channel axis: (I, P, C) -> (I, ceil(sqrt P / factor)^2, F).

    A block's patches follow each other row by row on the channel axis. The blocks follow each other row by row too, or
    column by column (`columns`), as VILA-1.5's checkpoints expect: its code returned the grid transposed.
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
