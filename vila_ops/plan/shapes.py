"""The widths of a model's matrices, from its config: what FLOPs and memory are counted by."""

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
"""Inputs and outputs of a linear layer."""


def numbers(matrices: Sequence[Matrix]) -> int:
    """Weights of linear layers; as many multiply-adds a token."""
    return sum(inputs * outputs for inputs, outputs in matrices)


def widths(matrices: Sequence[Matrix]) -> int:
    """Inputs and outputs of linear layers together: times a rank, the weights of their adapters."""
    return sum(inputs + outputs for inputs, outputs in matrices)


@dataclass(frozen=True)
class Block:
    """One transformer layer: q, k, v, the attention's output, and an MLP."""

    width: int
    """Of the residual stream."""
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
    """A whole model."""

    decoder: Block
    layers: int
    vocabulary: int
    """Rows of the embedding and of the head."""
    tied: bool
    """Embedding and head are one matrix."""
    tower: Block
    tower_layers: int
    """Up to the state that the projector reads; those above it are of no use."""
    tower_tokens: int
    """Of an image: patches and class tokens."""
    patches: int
    patch: Matrix
    """Pixels of a patch to the tower's width."""
    projector_blocks: tuple[Block, ...]
    """Over the patches."""
    projector: tuple[Matrix, ...]
    """Over the image tokens."""
    projector_norm: bool
    """A norm stands before its first matrix."""
    image_tokens: int
    """Of an image, after the projector."""


def shapes_of(config: VilaConfig) -> Shapes:
    """The shapes of a model's config, built on the meta device: nothing is allocated.

    Raises ValueError for a language model or tower with other layers than q, k, v, output and an MLP of linear layers.
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
    if held != (told := numbers(block.matrices)):
        raise ValueError(
            f"a layer of {config.model_type} has {held} weights in its matrices; q, k, v, output and the linear layers "
            f"of an MLP would be {told}: the planner counts no others"
        )
    return block


def _projector_block(channels: int, block: Any) -> Block:
    return Block(channels, block.self_attn.num_heads, channels, channels, tuple(_linear(block.mlp)))


def _linear(module: nn.Module) -> list[Matrix]:
    return [_matrix(one) for one in module.modules() if isinstance(one, nn.Linear)]


def _matrix(layer: nn.Linear) -> Matrix:
    return layer.in_features, layer.out_features
