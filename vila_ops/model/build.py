"""A config to a model: tower and language model put together around a fresh projector."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from vila_ops.config import Model
from vila_ops.config.model import RandomLanguageModel
from vila_ops.model.configuration import VilaConfig
from vila_ops.model.towers import build_tower, select_strategy
from vila_ops.model.vila import VilaForConditionalGeneration
from vila_ops.packages.resolve import language_model_folder

VOCABULARY_MULTIPLE = 64
"""The embedding is padded to a multiple of this; odd widths make slow matrix products."""


def build_model(
    model: Model, *, vocabulary: int, image_id: int, eos_id: int, cache: Path
) -> VilaForConditionalGeneration:
    """The untrained whole, fp32, in eval mode; equal for equal config and weights.

    vocabulary is the number of token ids in use, image_id the id of the image token.
    """
    torch.manual_seed(model.seed)
    tower = build_tower(model, cache=cache)
    language_model = _language_model(model, vocabulary=vocabulary, cache=cache)
    padded = -(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    language_model.resize_token_embeddings(padded, mean_resizing=False)
    config = config_of(model, tower, language_model, image_id=image_id, eos_id=eos_id)
    whole = VilaForConditionalGeneration(config)
    whole.model.vision_tower = tower
    whole.model.language_model = language_model.get_decoder()
    whole.lm_head.weight = language_model.get_output_embeddings().weight
    built: VilaForConditionalGeneration = whole.float().eval()
    return built


def config_of(model: Model, tower: Any, language_model: Any, *, image_id: int, eos_id: int) -> VilaConfig:
    """The config of tower and language model put together."""
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
