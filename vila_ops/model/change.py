"""What a stage changes of a model before it trains: the resolution, a visual expert. On files' tensors, so pure."""

import copy
import dataclasses

from torch import Tensor

from vila_ops.model.configuration import VilaConfig
from vila_ops.model.towers import at_image_size, sized
from vila_ops.model.trainable import EXPERT
from vila_ops.model.visual_expert import expert_names

DECODER = "model.language_model."


@dataclasses.dataclass(frozen=True)
class Change:
    """What is to be otherwise than in the folder that the stage starts from."""

    image_size: int | None = None
    """Side in pixels of the squares; None: as it is."""
    visual_expert: bool = False
    """Give the language model an expert if it has none."""


def changed(config: VilaConfig, state: dict[str, Tensor], change: Change) -> tuple[VilaConfig, dict[str, Tensor]]:
    """Config and weights of a model after a change; the same objects where nothing changes."""
    if change.image_size is not None and change.image_size != config.vision_side:
        config, state = _resized(config, state, change.image_size)
    if change.visual_expert and not config.visual_expert:
        return _with_expert(config, state)
    return config, state


def _resized(config: VilaConfig, state: dict[str, Tensor], side: int) -> tuple[VilaConfig, dict[str, Tensor]]:
    """For images of another size: the tower's positions are interpolated, and an image has as many tokens."""
    out = copy.deepcopy(config)
    out.vision_config, out.vision_side = sized(config.vision_config, side), side
    if not out.grid():
        raise ValueError(f"images of {side} pixels are less than one patch of the tower")
    out.image_seq_length = config.projector_choice().tokens(out.grid())
    return out, at_image_size(state, config.vision_config, side)


def _with_expert(config: VilaConfig, state: dict[str, Tensor]) -> tuple[VilaConfig, dict[str, Tensor]]:
    """An expert that is a copy of the language model's own weights, so the whole computes what it did."""
    after = copy.deepcopy(config)
    after.visual_expert = True
    names = [f"{DECODER}{name}" for name in expert_names(config.text_config)]
    return after, state | {name: state[name.replace(EXPERT, ".")].clone() for name in names}
