"""The projector `transformer`: blocks over the patches of one image, then a linear layer."""

# I images, P patches, C tower channels, D language model dim

from torch import Tensor, nn
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from vila_ops.config.model import TransformerProjector
from vila_ops.model.configuration import VilaConfig


class Transformer(nn.Module):
    """Pre-norm transformer blocks; each patch attends to all patches of its image. (I, P, C) -> (I, P, D).

    The blocks are CLIP's, with GELU and an MLP width of 4 C; a norm and a linear layer follow them.
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


def build(config: VilaConfig, choice: TransformerProjector) -> Transformer:
    """The blocks at the tower's width. Raises ValueError for heads that do not divide it."""
    return Transformer(config, choice)
