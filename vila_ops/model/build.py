"""Build a model from its config: tower, fresh projector and language model."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

from vila_ops.config import Model
from vila_ops.config.model import RandomLanguageModel
from vila_ops.model.component import component_config, read_component
from vila_ops.model.configuration import VilaConfig
from vila_ops.model.language_models import check_language_model
from vila_ops.model.projectors import plugin_of
from vila_ops.model.projectors.initialise import initialise
from vila_ops.model.seeds import generator, isolated
from vila_ops.model.shapes import check_shape
from vila_ops.model.towers import build_tower, select_strategy
from vila_ops.model.vila import VilaForConditionalGeneration
from vila_ops.packages.resolve import language_model_folder

VOCABULARY_MULTIPLE = 64
"""The embedding's rows are padded to a multiple of this, because odd widths make matrix products slow."""


def build_model(
    model: Model, *, vocabulary: int, image_id: int, eos_id: int, cache: Path
) -> VilaForConditionalGeneration:
    """The untrained model, fp32, in eval mode: a function of config and pretrained weights alone.

    `vocabulary` is the number of token ids in use, `image_id` the id of the image token.
    """
    tower = build_tower(model, cache=cache)
    language_model = _language_model(model, vocabulary=vocabulary, cache=cache)
    _add_rows(language_model, padded(vocabulary), seed=model.seed)
    config = config_of(model, tower, language_model, image_id=image_id, eos_id=eos_id)
    with torch.device("meta"):
        whole = VilaForConditionalGeneration(config)
    whole.model.vision_tower = tower
    whole.model.language_model = language_model.get_decoder()
    whole.take_head(language_model.get_output_embeddings())
    whole.model.multi_modal_projector.to_empty(device="cpu")
    initialise(whole.model.multi_modal_projector, std=_std(config), seed=model.seed)
    built: VilaForConditionalGeneration = whole.float().eval()
    return built


def padded(vocabulary: int) -> int:
    """Rows of the embedding for `vocabulary` token ids."""
    return -(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def config_of(model: Model, tower: Any, language_model: Any, *, image_id: int, eos_id: int) -> VilaConfig:
    """The config of a model with this tower and language model."""
    tied = bool(language_model.config.tie_word_embeddings)
    return VilaConfig(
        vision_config=tower.config,
        text_config=language_model.config,
        image_token_index=image_id,
        image_seq_length=model.image_tokens(),
        vision_feature_layer=model.feature_layer,
        vision_feature_select_strategy=select_strategy(tower.config),
        projector=model.projector.model_dump(mode="json"),
        projector_plugin=plugin_of(model.projector.kind),
        after_image=model.after_image,
        vision_side=model.image_size,
        image_aspect_ratio=model.image_aspect_ratio,
        tie_word_embeddings=tied,
        eos_token_id=eos_id,
        pad_token_id=eos_id,
    )


def _language_model(model: Model, *, vocabulary: int, cache: Path) -> PreTrainedModel:
    if isinstance(model.language_model, RandomLanguageModel):
        config = random_language_model(model.language_model, vocabulary=vocabulary)
        with isolated(model.seed, "language_model"):
            return AutoModelForCausalLM.from_config(config)
    folder = language_model_folder(model.language_model, cache=cache)
    config = component_config(folder)
    check_language_model(config, folder)
    check_shape(model.language_model, config)
    return read_component(AutoModelForCausalLM, folder, config)


@torch.no_grad()
def _add_rows(language_model: PreTrainedModel, rows: int, *, seed: int) -> None:
    """Extend embedding and head to at least `rows` rows; new ones are drawn as transformers does, by initializer_range.

    A vocabulary that has more rows keeps them.
    """
    old = language_model.get_input_embeddings().weight.shape[0]
    if rows <= old:
        return
    with isolated(seed, "resize"):  # its draws are replaced below
        language_model.resize_token_embeddings(rows, mean_resizing=False)
    matrices = {
        "embedding": language_model.get_input_embeddings().weight,
        "lm_head": language_model.get_output_embeddings().weight,
    }
    if language_model.config.tie_word_embeddings:
        matrices.pop("lm_head")
    for name, matrix in matrices.items():
        matrix[old:].normal_(0, _std(language_model.config), generator=generator(seed, name))
    if (bias := getattr(language_model.get_output_embeddings(), "bias", None)) is not None:
        bias[old:] = 0


def _std(config: PreTrainedConfig) -> float:
    """Standard deviation of new weights, which transformers reads from the language model's config."""
    return float(getattr(config.get_text_config(), "initializer_range", 0.02))


def random_language_model(config: RandomLanguageModel, *, vocabulary: int) -> LlamaConfig:
    """The transformers config of a random language model with `vocabulary` token ids."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=config.hidden_size,
        intermediate_size=2 * config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )


def embedding_std(model: VilaForConditionalGeneration) -> float:
    """Standard deviation of the token embeddings, the scale to which image tokens are fitted."""
    embedding = model.get_input_embeddings()
    weight: Tensor = embedding.weight
    return float(weight.detach().float().std() * getattr(embedding, "embed_scale", 1))  # Gemma scales what it looks up
