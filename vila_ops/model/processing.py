"""The processor in a model folder: tokenizer, chat template and image processor."""

from typing import Any, assert_never

from transformers import AutoProcessor, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from vila_ops.config.model import DownsampleProjector, ImageFit
from vila_ops.model.configuration import PROJECTOR, VilaConfig
from vila_ops.model.towers import class_tokens, patch_side

BICUBIC = 3
"""Number of the bicubic filter in an image processor's settings (PIL's)."""


class VilaProcessor(LlavaProcessor):  # type: ignore[misc]
    """LLaVA's processor for a projector that does not give one token a patch.

    The projector merges `downsample` x `downsample` patches into one token, or is a plugin's with settings `projector`.
    """

    def __init__(  # noqa: PLR0913 transformers reads a processor's components from the names of its arguments
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        num_additional_image_tokens: int = 0,
        downsample: int = 1,
        projector: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            image_processor, tokenizer, patch_size, vision_feature_select_strategy, chat_template, image_token,
            num_additional_image_tokens,
        )  # fmt: skip
        self.downsample = downsample
        if projector is not None:  # transformers saves every attribute that is set
            self.projector = projector

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        """Image tokens of one image: ceil(side / patch / downsample)^2, or the number that the plugin states."""
        height, width = image_inputs["pixel_values"][image_idx].shape[-2:]
        token: str = self.image_token
        if choice := getattr(self, "projector", None):
            return token * PROJECTOR.validate_python(choice).tokens(height // self.patch_size)
        rows, columns = (-(-(side // self.patch_size) // self.downsample) for side in (height, width))
        return token * int(rows * columns)


AutoProcessor.register(VilaConfig, VilaProcessor)


def build_processor(config: VilaConfig, tokenizer: PreTrainedTokenizerFast, *, mean_std: Any) -> LlavaProcessor:
    """The processor of a model: stock LLaVA's if an image has one token a patch, else VilaProcessor."""
    strategy = config.vision_feature_select_strategy
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # stock `generate` appends on the right
    shared = {
        "image_processor": image_processor(config.image_aspect_ratio, side=config.vision_side, mean_std=mean_std),
        "tokenizer": tokenizer,
        "patch_size": patch_side(config.vision_config),
        "vision_feature_select_strategy": strategy,
        "chat_template": tokenizer.chat_template,
        "num_additional_image_tokens": class_tokens(config.vision_config),
    }
    if isinstance(choice := config.projector_choice(), DownsampleProjector):
        return VilaProcessor(**shared, downsample=choice.factor)
    if choice.tokens(config.grid()) != config.grid() ** 2:
        return VilaProcessor(**shared, projector=config.projector)
    return LlavaProcessor(**shared)


def image_processor(fit: ImageFit, *, side: int, mean_std: Any) -> CLIPImageProcessorPil | LlavaImageProcessorPil:
    """The stock image processor that gives the pixels of `data.images`: `square` with that fit, then `pixels`."""
    mean, std = mean_std
    both = {"height": side, "width": side}
    shared = {"resample": BICUBIC, "image_mean": list(mean), "image_std": list(std)}
    match fit:
        case "pad":
            return LlavaImageProcessorPil(do_pad=True, size=both, do_center_crop=False, **shared)
        case "resize":
            return CLIPImageProcessorPil(size=both, do_center_crop=False, **shared)
        case "crop":
            return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=both, do_center_crop=True, **shared)
        case _:
            assert_never(fit)


def read_fit(stated: dict[str, Any]) -> tuple[ImageFit, int]:
    """How an image processor makes an image square, and the side in pixels, from the settings in its file.

    Settings that the file leaves out have their class's defaults. Raises ValueError for anything but pad, resize and
    crop with bicubic resampling.
    """
    kind = str(stated.get("image_processor_type", "CLIPImageProcessor"))
    crops = bool(stated.get("do_center_crop", kind.startswith(("CLIP", "Llava"))))
    size = _sides(stated.get("size", {"shortest_edge": 224}))
    crop = _sides(stated.get("crop_size", {"height": 224, "width": 224}))
    side = size.get("shortest_edge", size.get("height", 0))
    both, shortest = {"height": side, "width": side}, {"shortest_edge": side}
    keeps_all = not crops or crop in (both, shortest)
    if side and keeps_all and stated.get("resample", BICUBIC) == BICUBIC:
        if kind.startswith("Llava") and stated.get("do_pad", False) and size in (both, shortest):
            return "pad", side
        if size == both:
            return "resize", side
        if size == shortest and crops:
            return "crop", side
    raise ValueError(
        f"the image processor {kind} with size {size}, crop {crop if crops else None} and resampling "
        f"{stated.get('resample', BICUBIC)} is not supported; supported are pad, resize and crop, bicubic"
    )


def _sides(stated: dict[str, int | None] | int) -> dict[str, int]:
    """A size as a mapping; until transformers 4.22 it was one number, the shortest side."""
    pairs = {"shortest_edge": stated} if isinstance(stated, int) else stated
    return {key: value for key, value in pairs.items() if value is not None}
