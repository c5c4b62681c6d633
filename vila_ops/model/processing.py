"""The processor that travels with a checkpoint: tokenizer, chat template, and how pixels are made."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vila_ops.config import Model
from vila_ops.config.model import DownsampleProjector, RandomTower
from vila_ops.model.configuration import VilaConfig
from vila_ops.packages.resolve import vision_tower_folder

DEFAULT_MEAN_STD = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Of a tower that states none (random towers of tests)."""


class VilaProcessor(LlavaProcessor):  # type: ignore[misc]
    """LLaVA's processor for a projector that merges `downsample` x `downsample` patches into one token."""

    def __init__(  # noqa: PLR0913 transformers finds the parts of a processor by the names of all its arguments
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        num_additional_image_tokens: int = 0,
        downsample: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            image_processor, tokenizer, patch_size, vision_feature_select_strategy, chat_template, image_token,
            num_additional_image_tokens,
        )  # fmt: skip
        self.downsample = downsample

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        """The placeholders of one picture: ceil(side / patch / downsample)^2 image tokens."""
        height, width = image_inputs["pixel_values"][image_idx].shape[-2:]
        rows, columns = (-(-(side // self.patch_size) // self.downsample) for side in (height, width))
        token: str = self.image_token
        return token * int(rows * columns)


AutoProcessor.register(VilaConfig, VilaProcessor)


def build_processor(config: VilaConfig, tokenizer: PreTrainedTokenizerFast, *, mean_std: Any) -> LlavaProcessor:
    """The processor of a model: stock LLaVA's where its projector keeps every patch, ours where it merges them."""
    size = config.vision_side
    mean, std = mean_std
    images = CLIPImageProcessorPil(
        size={"height": size, "width": size},
        do_center_crop=False,
        resample=3,
        image_mean=list(mean),
        image_std=list(std),
    )
    strategy = config.vision_feature_select_strategy
    shared = {
        "image_processor": images,
        "tokenizer": tokenizer,
        "patch_size": config.vision_config.patch_size,
        "vision_feature_select_strategy": strategy,
        "chat_template": tokenizer.chat_template,
        "num_additional_image_tokens": 1 if strategy == "default" else 0,
    }
    if isinstance(choice := config.projector_choice(), DownsampleProjector):
        return VilaProcessor(**shared, downsample=choice.factor)
    return LlavaProcessor(**shared)


def mean_std(model: Model, *, cache: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Channel mean and deviation that the tower's folder states."""
    if isinstance(model.vision_tower, RandomTower):
        return DEFAULT_MEAN_STD
    path = vision_tower_folder(model.vision_tower, cache=cache) / "preprocessor_config.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing, so the tower's mean and deviation are not known; add the file")
    stated = json.loads(path.read_text())
    return tuple(stated["image_mean"]), tuple(stated["image_std"])
