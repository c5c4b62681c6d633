"""The projector `mlp_gelu`: linear layers with GELU between them."""

# I images, P patches, C tower channels, D language model dim

from itertools import pairwise

from torch import nn
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from vila_ops.config.model import MlpProjector
from vila_ops.model.configuration import VilaConfig


class Mlp(nn.Sequential):
    """`depth` linear layers with GELU between them. (I, P, C) -> (I, P, D)."""

    def __init__(self, config: VilaConfig, *, depth: int) -> None:
        dim = config.text_config.hidden_size
        widths = [config.vision_config.hidden_size, *[dim] * depth]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.GELU(), nn.Linear(before, after)]
        super().__init__(*layers[1:])


def build(config: VilaConfig, choice: MlpProjector) -> nn.Module:
    """transformers' own projector of LLaVA for two layers, ours for more."""
    return LlavaMultiModalProjector(config) if choice.depth == 2 else Mlp(config, depth=choice.depth)
