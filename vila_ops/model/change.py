"""What a stage changes of a model before it trains: the resolution, a visual expert. On files' tensors, so pure."""

import dataclasses

from torch import Tensor

from vila_ops.model.configuration import VilaConfig


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
        raise NotImplementedError
    if change.visual_expert and not config.visual_expert:
        raise NotImplementedError
    return config, state
