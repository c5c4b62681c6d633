"""Vision towers: building one, telling its patches from its other tokens, and resizing its position table.

A tower's position table always has the grid of its images. A table of another size is interpolated once, when the
model is built or a stage changes the size, not in every forward pass. So a folder needs no flag for it, and stock
LLaVA, which sets none, computes the same features.
"""

# P patches, C tower channels

import copy
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    AutoModel,
    CLIPVisionConfig,
    Dinov2Config,
    InternVLVisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
)

from vila_ops.config import Model
from vila_ops.config.model import RandomTower
from vila_ops.model.component import component_config, read_component
from vila_ops.model.seeds import isolated
from vila_ops.model.shapes import check_shape
from vila_ops.packages.resolve import vision_tower_folder

ARCHITECTURES: dict[str, tuple[type[PreTrainedConfig], int]] = {
    "clip": (CLIPVisionConfig, 1),
    "siglip": (SiglipVisionConfig, 0),
    "dinov2": (Dinov2Config, 1),
    "internvit": (InternVLVisionConfig, 1),
}
"""transformers' config class of each architecture, and its number of tokens before the patches. SigLIP 2 of one
resolution is `siglip` too."""
CLASS_TOKENS = {config.model_type: tokens for config, tokens in ARCHITECTURES.values()}
POSITIONS = ("embeddings.position_embedding.weight", "embeddings.position_embeddings")
"""Endings of the names of position tables."""
TOWER_PREFIXES = {r"^(model\.)?(vision_(tower|model)\.)+": ""}
"""Prefixes of a tower's weights in the folder of a CLIP, SigLIP, LLaVA or InternVL model -> none."""


def build_tower(model: Model, *, cache: Path) -> PreTrainedModel:
    """The tower of a recipe, fp32, at the recipe's image size.

    Raises ValueError for another patch size, too few layers or an unknown architecture, and CorruptArtifact for a
    folder without the tower's weights.
    """
    tower = _random(model, model.vision_tower) if isinstance(model.vision_tower, RandomTower) else _load(model, cache)
    if (patch := patch_side(tower.config)) != model.patch_size:
        raise ValueError(f"patch_size {model.patch_size} is not that of the tower; set it to {patch}")
    if -model.feature_layer > (states := tower.config.num_hidden_layers + 1):
        raise ValueError(
            f"feature_layer {model.feature_layer} of a tower with {states} hidden states; use -1 to -{states}"
        )
    if square_side(tower.config.image_size) == model.image_size:
        return tower
    state = at_image_size(tower.state_dict(), tower.config, model.image_size)
    config = with_image_size(tower.config, model.image_size)
    resized: PreTrainedModel = type(tower).from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    return resized


def select_strategy(vision_config: PreTrainedConfig) -> Literal["default", "full"]:
    """LLaVA's name for the selection of patches: `default` drops the class token, `full` keeps all tokens."""
    return "default" if class_tokens(vision_config) else "full"


def vision_part(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the tower in a folder, which may hold a text tower too, as CLIP's do.

    Raises ValueError for an architecture that is not supported.
    """
    vision: PreTrainedConfig = getattr(config, "vision_config", config)
    class_tokens(vision)
    return vision


def class_tokens(vision_config: PreTrainedConfig) -> int:
    """Tokens before the patches in the tower's output. Raises ValueError for an architecture that is not supported."""
    if vision_config.model_type not in CLASS_TOKENS:
        raise ValueError(
            f"a tower of type {vision_config.model_type!r} is not supported; use one of {sorted(CLASS_TOKENS)}, whose "
            f"output is at most a class token and then one token a patch"
        )
    return CLASS_TOKENS[vision_config.model_type]


def patch_side(vision_config: PreTrainedConfig) -> int:
    """Side in pixels of the tower's patch."""
    return square_side(vision_config.patch_size)


def square_side(size: int | list[int] | tuple[int, ...]) -> int:
    """The side of a square that a config states as one number or, as InternViT's does, as height and width."""
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(f"height and width {tuple(size) if not isinstance(size, int) else size} are not a square")
    return sides.pop()


def with_image_size(vision_config: PreTrainedConfig, image_size: int) -> PreTrainedConfig:
    """A tower's config at another image size, in the form (number or pair) that the config uses."""
    out = copy.deepcopy(vision_config)
    out.image_size = image_size if isinstance(vision_config.image_size, int) else (image_size, image_size)
    return out


def at_image_size(state: dict[str, Tensor], vision_config: PreTrainedConfig, image_size: int) -> dict[str, Tensor]:
    """Weights with the position table interpolated to the grid of another image size; all others are unchanged.

    The state may be a tower's or a whole model's. Raises ValueError for a table that is missing or not a square grid.
    """
    names = [name for name in state if name.endswith(POSITIONS) and "language_model." not in name]
    if len(names) != 1:
        raise ValueError(f"one position table is needed to change the image size; the state has {names}")
    table = state[names[0]]
    grid = image_size // patch_side(vision_config)
    resized = resize_positions(table.reshape(-1, table.shape[-1]), grid, class_tokens=class_tokens(vision_config))
    return {**state, names[0]: resized.reshape(*table.shape[:-2], *resized.shape)}


def resize_positions(table: Tensor, grid: int, *, class_tokens: int) -> Tensor:
    """A position table (class_tokens + P, C) -> (class_tokens + grid^2, C); class tokens keep their rows.

    Bicubic without antialiasing, as transformers' `interpolate_pos_encoding` and DINOv2 do in a forward pass.
    """
    front, patches = table[:class_tokens], table[class_tokens:]
    side = round(len(patches) ** 0.5)
    if side * side != len(patches):
        raise ValueError(f"{len(patches)} positions are not a square grid, so they cannot be interpolated")
    if side == grid:
        return table
    image = patches.float().view(1, side, side, -1).permute(0, 3, 1, 2)
    image = torch.nn.functional.interpolate(image, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([front, image.permute(0, 2, 3, 1).reshape(grid * grid, -1).to(table.dtype)])


def _load(model: Model, cache: Path) -> PreTrainedModel:
    assert not isinstance(model.vision_tower, RandomTower)
    folder = vision_tower_folder(model.vision_tower, cache=cache)
    vision = vision_part(component_config(folder))
    check_shape(model.vision_tower, vision)
    vision.architectures = None
    return read_component(AutoModel, folder, vision, key_mapping=TOWER_PREFIXES)


def _random(model: Model, tower: RandomTower) -> PreTrainedModel:
    shape: dict[str, Any] = {
        "hidden_size": tower.hidden_size,
        "num_hidden_layers": tower.num_layers,
        "num_attention_heads": tower.num_heads,
        "image_size": model.image_size,
        "patch_size": model.patch_size,
    }
    config_class, _ = ARCHITECTURES[tower.architecture]
    has_ratio = hasattr(config_class, "mlp_ratio")
    mlp = {"mlp_ratio": 2} if has_ratio else {"intermediate_size": 2 * tower.hidden_size}
    config = config_class(**shape, **mlp)
    with isolated(model.seed, "vision_tower"):
        built: PreTrainedModel = AutoModel.from_config(config)
    return built
