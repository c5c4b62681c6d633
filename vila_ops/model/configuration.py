"""The transformers config of VILA: LLaVA's, plus the choice of projector."""

from typing import Literal

from transformers import AutoConfig, LlavaConfig


class VilaConfig(LlavaConfig):  # type: ignore[misc]
    """LLaVA's config with VILA's projectors."""

    model_type = "vila_llava"
    mm_projector_type: Literal["linear", "mlp2x_gelu", "mlp_downsample"] = "mlp2x_gelu"
    mm_downsample: int = 1
    after_image: str = ""
    """What follows a picture in a document: prompts of that form need it."""
    vision_side: int = 336
    """Side in pixels of the square that the tower sees; its position table may be of another size."""


AutoConfig.register(VilaConfig.model_type, VilaConfig)
