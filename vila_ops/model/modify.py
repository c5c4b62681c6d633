"""What a stage modifies in a model before it trains: the image size, a visual expert. Pure functions on state dicts."""

import copy
import dataclasses

from torch import Tensor

from vila_ops.model.configuration import VilaConfig
from vila_ops.model.towers import at_image_size, patch_side, with_image_size
from vila_ops.model.trainable import EXPERT
from vila_ops.model.visual_expert import expert_names

DECODER = "model.language_model."


@dataclasses.dataclass(frozen=True)
class Modifications:
    """Differences from the folder that the stage starts from."""

    image_size: int | None = None
    """Side of the square images in pixels; None: unchanged."""
    visual_expert: bool = False
    """Add an expert to a language model that has none."""


def modified(
    config: VilaConfig, state: dict[str, Tensor], modifications: Modifications
) -> tuple[VilaConfig, dict[str, Tensor]]:
    """Config and weights of the modified model; the same objects if nothing changes.

    Raises ValueError for an image size below one patch of the tower.
    """
    if modifications.image_size is not None and modifications.image_size != config.vision_side:
        config, state = _resized(config, state, modifications.image_size)
    if modifications.visual_expert and not config.visual_expert:
        return _with_expert(config, state)
    return config, state


def _resized(config: VilaConfig, state: dict[str, Tensor], side: int) -> tuple[VilaConfig, dict[str, Tensor]]:
    """Another image size: the tower's position table is interpolated, and the number of image tokens follows."""
    out = copy.deepcopy(config)
    out.vision_config, out.vision_side = with_image_size(config.vision_config, side), side
    if not out.grid():
        raise ValueError(
            f"image_size {side} is less than one patch of the tower, {patch_side(config.vision_config)} pixels"
        )
    out.image_seq_length = config.projector_choice().tokens(out.grid())
    return out, at_image_size(state, config.vision_config, side)


def _with_expert(config: VilaConfig, state: dict[str, Tensor]) -> tuple[VilaConfig, dict[str, Tensor]]:
    """An expert that is a copy of the language model's weights, so the model's outputs do not change."""
    after = copy.deepcopy(config)
    after.visual_expert = True
    names = [f"{DECODER}{name}" for name in expert_names(config.text_config)]
    return after, state | {name: state[name.replace(EXPERT, ".")].clone() for name in names}
