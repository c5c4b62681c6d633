"""A config to a model: tower and language model put together around a fresh projector."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Dinov2Config,
    LlamaConfig,
    PreTrainedModel,
    SiglipVisionConfig,
)

from vila_ops.config import Model
from vila_ops.config.model import RandomLanguageModel, RandomTower
from vila_ops.model.configuration import VilaConfig
from vila_ops.model.vila import VilaForConditionalGeneration
from vila_ops.packages.resolve import language_model_folder, vision_tower_folder

VOCABULARY_MULTIPLE = 64
"""The embedding is padded to a multiple of this; odd widths make slow matrix products."""


def build_model(
    model: Model, *, vocabulary: int, image_id: int, eos_id: int, cache: Path
) -> VilaForConditionalGeneration:
    """The untrained whole, fp32, in eval mode; equal for equal config and weights.

    vocabulary is the number of token ids in use, image_id the id of the image token.
    """
    torch.manual_seed(model.seed)
    tower = _tower(model, cache=cache)
    language_model = _language_model(model, vocabulary=vocabulary, cache=cache)
    padded = -(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    language_model.resize_token_embeddings(padded, mean_resizing=False)
    config = _config(model, tower, language_model, image_id=image_id, eos_id=eos_id)
    whole = VilaForConditionalGeneration(config)
    whole.model.vision_tower = tower
    whole.model.language_model = language_model.get_decoder()
    whole.lm_head.weight = language_model.get_output_embeddings().weight
    built: VilaForConditionalGeneration = whole.float().eval()
    return built


def select_strategy(vision_config: Any) -> str:
    """default drops the class token that the tower puts first; full keeps all (SigLIP has none)."""
    return "full" if "siglip" in vision_config.model_type else "default"


def _config(model: Model, tower: Any, language_model: Any, *, image_id: int, eos_id: int) -> VilaConfig:
    if tower.config.patch_size != model.patch_size:
        raise ValueError(
            f"the tower has patches of {tower.config.patch_size} pixels, the recipe says {model.patch_size}"
        )
    tied = bool(language_model.config.tie_word_embeddings)
    return VilaConfig(
        vision_config=tower.config,
        text_config=language_model.config,
        image_token_index=image_id,
        image_seq_length=model.image_tokens(),
        vision_feature_layer=model.feature_layer,
        vision_feature_select_strategy=select_strategy(tower.config),
        projector=model.projector.model_dump(mode="json"),
        after_image=model.after_image,
        vision_side=model.image_size,
        image_fit=model.image_fit,
        tie_word_embeddings=tied,
        eos_token_id=eos_id,
        pad_token_id=eos_id,
    )


def _tower(model: Model, *, cache: Path) -> PreTrainedModel:
    if not isinstance(model.vision_tower, RandomTower):
        folder = vision_tower_folder(model.vision_tower, cache=cache)
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        vision = getattr(config, "vision_config", config)  # a CLIP folder holds its text side too
        if vision is not config:
            vision.architectures = None
        return AutoModel.from_pretrained(folder, config=vision, local_files_only=True, dtype=torch.float32)
    shape = {
        "hidden_size": model.vision_tower.hidden_size,
        "num_hidden_layers": model.vision_tower.num_layers,
        "num_attention_heads": model.vision_tower.num_heads,
        "image_size": model.image_size,
        "patch_size": model.patch_size,
    }
    match model.vision_tower.architecture:
        case "clip":
            return AutoModel.from_config(CLIPVisionConfig(**shape, intermediate_size=2 * shape["hidden_size"]))
        case "siglip":
            return AutoModel.from_config(SiglipVisionConfig(**shape, intermediate_size=2 * shape["hidden_size"]))
        case "dinov2":
            return AutoModel.from_config(Dinov2Config(**shape, mlp_ratio=2))


def _language_model(model: Model, *, vocabulary: int, cache: Path) -> PreTrainedModel:
    if not isinstance(model.language_model, RandomLanguageModel):
        folder = language_model_folder(model.language_model, cache=cache)
        return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=model.language_model.hidden_size,
        intermediate_size=2 * model.language_model.hidden_size,
        num_hidden_layers=model.language_model.num_layers,
        num_attention_heads=model.language_model.num_heads,
        num_key_value_heads=model.language_model.num_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config)


def embedding_std(model: VilaForConditionalGeneration) -> float:
    """Standard deviation of the token embeddings: the scale that image tokens should have."""
    weight: Tensor = model.get_input_embeddings().weight
    return float(weight.detach().float().std())
