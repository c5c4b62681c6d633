"""The model: vision tower -> projector -> language model, image features put where the placeholders stand."""

# B rows, T tokens, I images, P patches, C tower channels, D language model dim

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from vila_ops.model.configuration import VilaConfig
from vila_ops.model.projectors import build_projector


class VilaForConditionalGeneration(LlavaForConditionalGeneration):  # type: ignore[misc]
    """transformers' LLaVA with VILA's projectors, and with tower features as an input of their own.

    A frozen tower's features can so be computed once and used by every stage.
    """

    config_class = VilaConfig

    def __init__(self, config: VilaConfig) -> None:
        super().__init__(config)
        self.model.multi_modal_projector = build_projector(config)
        self.post_init()

    def tower_features(self, pixel_values: Tensor) -> Tensor:
        """What the projector reads: the chosen hidden state of the tower, (I, 3, S, S) -> (I, P, C)."""
        tower = self.model.vision_tower
        states = tower(pixel_values.to(tower.dtype), output_hidden_states=True).hidden_states
        chosen: Tensor = states[self.config.vision_feature_layer]
        return chosen[:, 1:] if self.config.vision_feature_select_strategy == "default" else chosen

    def embed(self, input_ids: Tensor, features: Tensor | None) -> Tensor:
        """Token embeddings (B, T, D) of ids (B, T), with projected features (I, P, C) at the image tokens.

        Raises ValueError when placeholders and features do not match in number.
        """
        embeddings: Tensor = self.get_input_embeddings()(input_ids)
        is_image = input_ids == self.config.image_token_id
        if features is None or not len(features):
            if is_image.any():
                raise ValueError(f"{int(is_image.sum())} image positions but no image features")
            return embeddings
        projected = self.model.multi_modal_projector(features).flatten(0, 1).to(embeddings.dtype)
        if int(is_image.sum()) != len(projected):
            raise ValueError(f"{int(is_image.sum())} image positions but {len(projected)} projected features")
        return embeddings.masked_scatter(is_image[..., None], projected)

    def hidden(self, embeddings: Tensor, **kwargs: Any) -> Any:
        """The language model's output (last_hidden_state (B, T, D), cache) for embeddings (B, T, D)."""
        return self.model.language_model(inputs_embeds=embeddings, **kwargs)


def losses(model: VilaForConditionalGeneration, hidden: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihoods (N,) in nats, fp32, of the labels (B, T) that are not negative.

    The head is applied at those positions only: logits of a whole row never stand in memory.
    """
    wanted = labels >= 0
    logits = model.lm_head(hidden[wanted]).float()
    return torch.nn.functional.cross_entropy(logits, labels[wanted], reduction="none")


AutoModelForImageTextToText.register(VilaConfig, VilaForConditionalGeneration)
