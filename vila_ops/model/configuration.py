"""The transformers config of VILA: LLaVA's, plus the choice of projector."""

from typing import Any

from pydantic import TypeAdapter
from transformers import AutoConfig, LlavaConfig

from vila_ops.config.model import ImageFit, Projector
from vila_ops.model.towers import patch_side

PROJECTOR: TypeAdapter[Projector] = TypeAdapter(Projector)


class VilaConfig(LlavaConfig):  # type: ignore[misc]
    """LLaVA's config with any projector, a visual expert, and what prompts and images of the model look like."""

    model_type = "vila_llava"
    projector: dict[str, Any] | None = None
    """The recipe's projector, as its config class dumps it; None: LLaVA's two layers."""
    projector_plugin: dict[str, Any] | None = None
    """Package, version and revision of the plugin that the projector comes from; None: it is one of ours."""
    visual_expert: bool = False
    """Whether the language model has a second set of weights for image tokens."""
    after_image: str = ""
    """Text that follows an image in a document, which prompts of that form repeat."""
    vision_side: int = 336
    """Side in pixels of the square images that the tower reads."""
    image_aspect_ratio: ImageFit = "pad"
    """How an image becomes that square; the folder's image processor does the same."""

    def grid(self) -> int:
        """Patches along a side of an image; pixels beyond the last whole patch are not read."""
        return self.vision_side // patch_side(self.vision_config)

    def projector_choice(self) -> Projector:
        """The projector as a config class."""
        return PROJECTOR.validate_python(self.projector or {"kind": "mlp_gelu"})


AutoConfig.register(VilaConfig.model_type, VilaConfig)
