"""Vision towers: how one is built, which of its tokens are patches, and its positions at another image size.

A tower's position table is always as large as the grid of the images it is given: one made for another size is
interpolated once, when the model is built or a stage changes the size, not in every forward pass. The folder then
needs no flag to be read, and stock LLaVA, which sets none, gives the same features.
"""

# P patches, C tower channels

import copy
from pathlib import Path
from typing import Any, Literal, assert_never

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPVisionConfig,
    Dinov2Config,
    InternVLVisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
)

from vila_ops.config import Model
from vila_ops.config.model import HubTower, RandomTower
from vila_ops.model.part import read_part
from vila_ops.model.seeds import isolated
from vila_ops.model.shapes import check_shape
from vila_ops.packages.resolve import vision_tower_folder

CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0, "dinov2": 1, "internvl_vision": 1}
"""Tokens before the patches, by model type (SigLIP 2 of one resolution is siglip_vision_model too)."""
POSITIONS = ("embeddings.position_embedding.weight", "embeddings.position_embeddings")
"""How the names of position tables end."""
IN_A_WHOLE_MODEL = {r"^(model\.)?(vision_(tower|model)\.)+": ""}
"""Where a tower's weights lie in the folder of a CLIP, SigLIP, LLaVA or InternVL model."""


def build_tower(model: Model, *, cache: Path) -> PreTrainedModel:
    """The tower of a config, fp32, at the config's image size.

    Raises ValueError for a tower of another patch size, of too few layers or of a kind not known, and for a folder
    without its weights.
    """
    tower = _random(model, model.vision_tower) if isinstance(model.vision_tower, RandomTower) else _load(model, cache)
    if (patch := patch_side(tower.config)) != model.patch_size:
        raise ValueError(f"the tower has patches of {patch} pixels, the recipe says {model.patch_size}")
    if -model.feature_layer > (states := tower.config.num_hidden_layers + 1):
        raise ValueError(
            f"feature_layer {model.feature_layer} of a tower that has {states} states; use -1 to -{states}"
        )
    if square_side(tower.config.image_size) == model.image_size:
        return tower
    state = at_image_size(tower.state_dict(), tower.config, model.image_size)
    config = sized(tower.config, model.image_size)
    resized: PreTrainedModel = type(tower).from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    return resized


def select_strategy(vision_config: PreTrainedConfig) -> Literal["default", "full"]:
    """LLaVA's name for which tokens are patches: default drops the class token in front, full has none to drop."""
    return "default" if class_tokens(vision_config) else "full"


def class_tokens(vision_config: PreTrainedConfig) -> int:
    """Tokens that the tower puts before its patches. Raises ValueError for a tower that LLaVA's format cannot hold."""
    if vision_config.model_type not in CLASS_TOKENS:
        raise ValueError(
            f"a tower of type {vision_config.model_type!r} is not known; one whose output is at most a class token and "
            f"then one token a patch is of type {sorted(CLASS_TOKENS)}"
        )
    return CLASS_TOKENS[vision_config.model_type]


def patch_side(vision_config: PreTrainedConfig) -> int:
    """Side in pixels of the tower's patch."""
    return square_side(vision_config.patch_size)


def square_side(size: int | list[int] | tuple[int, ...]) -> int:
    """The side of a square that a config gives as a number, or, as InternViT's does, as height and width."""
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(f"height and width {tuple(size) if not isinstance(size, int) else size} are not a square")
    return sides.pop()


def sized(vision_config: PreTrainedConfig, image_size: int) -> PreTrainedConfig:
    """A tower's config at another image size, said in the way in which it says its own."""
    out = copy.deepcopy(vision_config)
    out.image_size = image_size if isinstance(vision_config.image_size, int) else (image_size, image_size)
    return out


def at_image_size(state: dict[str, Tensor], vision_config: PreTrainedConfig, image_size: int) -> dict[str, Tensor]:
    """Weights whose position table is interpolated to the grid of another image size; all else as it is.

    The state may be a tower's or a whole model's. Raises ValueError where it holds no table, or one of no square.
    """
    names = [name for name in state if name.endswith(POSITIONS) and "language_model." not in name]
    if len(names) != 1:
        raise ValueError(f"one position table is needed to change the image size, found {names}")
    table = state[names[0]]
    grid = image_size // patch_side(vision_config)
    resized = resize_positions(table.reshape(-1, table.shape[-1]), grid, class_tokens=class_tokens(vision_config))
    return {**state, names[0]: resized.reshape(*table.shape[:-2], *resized.shape)}


def resize_positions(table: Tensor, grid: int, *, class_tokens: int) -> Tensor:
    """A position table (class_tokens + P, C) for grid x grid patches, in two dimensions; the class token's is kept.

    Bicubic without antialiasing: what transformers' `interpolate_pos_encoding` and DINOv2 do in a forward pass.
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
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    vision = getattr(config, "vision_config", config)  # the folder of a CLIP holds its text side too
    class_tokens(vision)
    if isinstance(model.vision_tower, HubTower):
        check_shape(model.vision_tower, vision)
    vision.architectures = None
    return read_part(AutoModel, folder, vision, key_mapping=IN_A_WHOLE_MODEL)


def _random(model: Model, tower: RandomTower) -> PreTrainedModel:
    shape: dict[str, Any] = {
        "hidden_size": tower.hidden_size,
        "num_hidden_layers": tower.num_layers,
        "num_attention_heads": tower.num_heads,
        "image_size": model.image_size,
        "patch_size": model.patch_size,
    }
    wide = 2 * tower.hidden_size
    match tower.architecture:
        case "clip":
            config: PreTrainedConfig = CLIPVisionConfig(**shape, intermediate_size=wide)
        case "siglip":
            config = SiglipVisionConfig(**shape, intermediate_size=wide)
        case "dinov2":
            config = Dinov2Config(**shape, mlp_ratio=2)
        case "internvit":
            config = InternVLVisionConfig(**shape, intermediate_size=wide)
        case _:
            assert_never(tower.architecture)
    with isolated(model.seed, "vision_tower"):
        built: PreTrainedModel = AutoModel.from_config(config)
    return built
