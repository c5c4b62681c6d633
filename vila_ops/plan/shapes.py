"""The shapes of a model's matrices, from its config; FLOPs and memory are computed from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from vila_ops.model.configuration import VilaConfig
from vila_ops.model.projectors import build_projector
from vila_ops.model.towers import class_tokens, patch_side

Matrix = tuple[int, int]
"""Numbers of inputs and outputs of a linear layer."""


def numbers(matrices: Sequence[Matrix]) -> int:
    """Return the number of weights of linear layers, which is also their multiply-adds per token."""
    return sum(inputs * outputs for inputs, outputs in matrices)


def widths(matrices: Sequence[Matrix]) -> int:
    """Return the inputs and outputs of linear layers in total. Times a rank, this is the weights of their adapters."""
    return sum(inputs + outputs for inputs, outputs in matrices)


@dataclass(frozen=True)
class Block:
    """One transformer layer: q, k, v and output of the attention, and an MLP."""

    width: int
    """Width of the residual stream."""
    heads: int
    attention: int
    """Heads x head dimension."""
    key_value: int
    """Key-value heads x head dimension: width of the keys, and of the values."""
    mlp: tuple[Matrix, ...]

    @property
    def qkv(self) -> tuple[Matrix, ...]:
        """The layers that read the attention's input."""
        return ((self.width, self.attention), (self.width, self.key_value), (self.width, self.key_value))

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """All linear layers."""
        return (*self.qkv, (self.attention, self.width), *self.mlp)


@dataclass(frozen=True)
class Shapes:
    """The shapes of a whole model."""

    decoder: Block
    layers: int
    vocabulary: int
    """Rows of the embedding and of the head."""
    tied: bool
    """Whether embedding and head are one matrix."""
    tower: Block
    tower_layers: int
    """Layers up to the state that the projector reads."""
    tower_tokens: int
    """Tokens per image: patches and class tokens."""
    patches: int
    patch: Matrix
    """The matrix from the pixels of a patch to the tower's width."""
    projector_blocks: tuple[Block, ...]
    """Transformer blocks of the projector, over the patches."""
    projector: tuple[Matrix, ...]
    """Linear layers of the projector, over the image tokens."""
    projector_norm: bool
    """Whether a norm comes before the first of these layers."""
    image_tokens: int
    """Tokens per image after the projector."""


def shapes_of(config: VilaConfig) -> Shapes:
    """Return the shapes of a model with this config. The model is built on the meta device, without memory.

    Raises ValueError for a language model or tower whose layers have matrices besides q, k, v, output and an MLP.
    """
    vision, text = config.vision_config, config.text_config
    with torch.device("meta"):
        decoder, tower = AutoModel.from_config(text), AutoModel.from_config(vision)
        projector = build_projector(config)
    blocks = [one for one in projector.modules() if isinstance(one, CLIPEncoderLayer)]
    within = {id(one) for block in blocks for one in block.modules()}
    channels = vision.hidden_size
    return Shapes(
        decoder=_block(_layers(decoder, text)[0], text),
        layers=text.num_hidden_layers,
        vocabulary=text.vocab_size,
        tied=bool(config.tie_word_embeddings),
        tower=_block(_layers(tower, vision)[0], vision),
        tower_layers=vision.num_hidden_layers + 1 + config.vision_feature_layer,
        tower_tokens=config.grid() ** 2 + class_tokens(vision),
        patches=config.grid() ** 2,
        patch=(3 * patch_side(vision) ** 2, channels),
        projector_blocks=tuple(_projector_block(channels, block) for block in blocks),
        projector=tuple(
            _matrix(one) for one in projector.modules() if isinstance(one, nn.Linear) and id(one) not in within
        ),
        projector_norm=any(isinstance(one, nn.LayerNorm) for one in projector.modules()),
        image_tokens=config.projector_choice().tokens(config.grid()),
    )


def _layers(module: nn.Module, config: PreTrainedConfig) -> nn.ModuleList:
    return next(m for m in module.modules() if isinstance(m, nn.ModuleList) and len(m) == config.num_hidden_layers)


def _block(layer: Any, config: PreTrainedConfig) -> Block:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    mlp = getattr(layer, "mlp", nn.Module())
    block = Block(config.hidden_size, heads, heads * head_dim, groups * head_dim, tuple(_linear(mlp)))
    held = sum(p.numel() for p in layer.parameters() if p.ndim >= 2)
    if held != (counted := numbers(block.matrices)):
        raise ValueError(
            f"a layer of {config.model_type} has {held} weights in its matrices, but q, k, v, output and the linear "
            f"layers of an MLP are {counted}; the planner knows no other layers"
        )
    return block


def _projector_block(channels: int, block: Any) -> Block:
    return Block(channels, block.self_attn.num_heads, channels, channels, tuple(_linear(block.mlp)))


def _linear(module: nn.Module) -> list[Matrix]:
    return [_matrix(one) for one in module.modules() if isinstance(one, nn.Linear)]


def _matrix(layer: nn.Linear) -> Matrix:
    return layer.in_features, layer.out_features
