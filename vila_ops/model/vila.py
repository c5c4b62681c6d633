"""The model: vision tower -> projector -> language model; image features replace the embeddings of image tokens."""

# B rows, T tokens, I images, P patches, C tower channels, D language model dim, M image tokens, N target tokens

import functools
from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from vila_ops.model.configuration import VilaConfig
from vila_ops.model.language_models import head_form
from vila_ops.model.loss import Head
from vila_ops.model.projectors import build_projector
from vila_ops.model.visual_expert import add_visual_expert, route


class VilaForConditionalGeneration(LlavaForConditionalGeneration):  # type: ignore[misc]
    """transformers' LLaVA with any projector, and with tower features as a separate input.

    So a frozen tower's features are computed once and used by every stage.
    """

    config_class = VilaConfig

    def __init__(self, config: VilaConfig) -> None:
        super().__init__(config)
        self.model.multi_modal_projector = build_projector(config)
        self.lm_head.__class__ = Head  # same weights: a new layer would draw random numbers
        self.lm_head.set_form(head_form(config.text_config))
        if config.visual_expert:
            add_visual_expert(self.model.language_model)
        self.post_init()

    def take_head(self, head: nn.Linear) -> None:
        """Take the parameters of a language model's head, which may be those of its embedding."""
        for name, parameter in head.named_parameters():
            setattr(self.lm_head, name, parameter)

    def tower_features(self, pixel_values: Tensor) -> Tensor:
        """Patch features, the projector's input: one hidden state of the tower, (I, 3, S, S) -> (I, P, C)."""
        tower = self.model.vision_tower
        states = tower(pixel_values.to(tower.dtype), output_hidden_states=True).hidden_states
        state: Tensor = states[self.config.vision_feature_layer]
        return state[:, 1:] if self.config.vision_feature_select_strategy == "default" else state

    def embed(self, input_ids: Tensor, features: Tensor | None, image_tokens: Tensor | None = None) -> Tensor:
        """Token embeddings (B, T, D) of ids (B, T), with the projections of features (I, P, C) at the image tokens.

        `image_tokens` (M,) are the places of the image tokens in all rows end to end; None: they are looked up, for
        which the host waits for the device. Raises ValueError if M is not the number of projected features.
        """
        embeddings: Tensor = self.get_input_embeddings()(input_ids)
        if image_tokens is None:
            image_tokens = (input_ids.flatten() == self.config.image_token_id).nonzero()[:, 0]
        if features is None or not len(features):
            if len(image_tokens):
                raise ValueError(f"{len(image_tokens)} image tokens but no image features")
            return embeddings
        projected = self.model.multi_modal_projector(features).flatten(0, 1).to(embeddings.dtype)
        if len(image_tokens) != len(projected):
            raise ValueError(f"{len(image_tokens)} image tokens but {len(projected)} projected features")
        # Not a view, which a compiled layer would take for another kind of input than text alone.
        return embeddings.index_put((image_tokens // input_ids.shape[1], image_tokens % input_ids.shape[1]), projected)

    def hidden(self, embeddings: Tensor, **kwargs: Any) -> Any:
        """The language model's output (last_hidden_state (B, T, D), cache) for embeddings (B, T, D).

        A model with a visual expert also needs the arguments that `routing` returns.
        """
        return self.model.language_model(inputs_embeds=embeddings, **kwargs)

    def routing(self, input_ids: Tensor, *, everywhere: bool = False) -> dict[str, Any]:
        """Arguments of `hidden` for ids (B, T): the positions that the visual expert computes; empty without an expert.

        Without image tokens the expert is skipped, unless `everywhere`: if one rank runs it, all ranks must.
        """
        if not self.config.visual_expert:
            return {}
        is_image = input_ids == self.config.image_token_id
        return {"routes": route(is_image) if everywhere or is_image.any() else None}

    @functools.wraps(LlavaForConditionalGeneration.forward)  # generate reads the signature
    def forward(self, input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """LLaVA's forward pass. Raises ValueError if a model with a visual expert gets no input_ids."""
        if self.config.visual_expert:
            if input_ids is None:
                raise ValueError("a visual expert is routed by token ids; give input_ids, not inputs_embeds")
            kwargs |= self.routing(input_ids)
        return super().forward(input_ids, *args, **kwargs)


def losses(
    model: VilaForConditionalGeneration, hidden: Tensor, targets: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Losses in nats, fp32, of hidden states (B, T, D) at N places in all rows end to end; see Head.

    `targets` (N,) are the places and `labels` (N,) the tokens to predict there. Returns the sum, which can be
    differentiated, and the N negative log-likelihoods. The head is applied at those places only.
    """
    total, each = model.lm_head(hidden.flatten(0, 1).index_select(0, targets), labels)
    return total, each


AutoModelForImageTextToText.register(VilaConfig, VilaForConditionalGeneration)
