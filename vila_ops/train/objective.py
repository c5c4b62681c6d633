"""The training objective: the summed token loss of a micro-batch of packed rows."""

# B rows, T tokens, M image tokens, N target tokens, I images, P patches, C tower channels, S side in pixels

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from vila_ops.model import attention
from vila_ops.model.lora import set_draws
from vila_ops.model.trainable import EXPERT, component_of
from vila_ops.model.vila import VilaForConditionalGeneration, losses
from vila_ops.model.visual_expert import Routes, route
from vila_ops.train.profile import span


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Places of tokens are counted in all rows end to end, and known on the host."""

    input_ids: Tensor
    """(B, T)"""
    position_ids: Tensor
    """(B, T), counted from 0 in each sample."""
    segment_ids: Tensor
    """(B, T), the number of the sample in its row, from 1; 0 is padding."""
    targets: Tensor
    """(N,), the places at which a token is predicted."""
    labels: Tensor
    """(N,), the tokens to predict there."""
    image_tokens: Tensor
    """(M,), the places of image tokens."""
    mask: attention.MaskPlan
    """What the attention kernel needs besides segment ids."""
    routes: Routes | None
    """Which positions a visual expert computes. None: the model has none."""
    any_images: bool
    """Whether any rank has images in this pass."""
    features: Tensor | None = None
    """(I, P, C), features of a frozen tower. None without images."""
    pixel_values: Tensor | None = None
    """(I, 3, S, S), pixels for a tower that trains. None without images."""
    draws: tuple[int, ...] | None = None
    """(B,), the seed of each row's dropout. None: no dropout."""

    @classmethod
    def of_tokens(
        cls,
        model: VilaForConditionalGeneration,
        *,
        input_ids: Tensor,
        position_ids: Tensor,
        segment_ids: Tensor,
        labels: Tensor,
        any_images: bool,
    ) -> Self:
        """The batch of tokens (B, T) in the host's memory, without images; a label that is negative is ignored."""
        is_image = input_ids == model.config.image_token_id
        targets = (labels.flatten() >= 0).nonzero()[:, 0]
        return cls(
            input_ids=input_ids,
            position_ids=position_ids,
            segment_ids=segment_ids,
            targets=targets,
            labels=labels.flatten()[targets],
            image_tokens=is_image.flatten().nonzero()[:, 0],
            mask=attention.plan(model, segment_ids),
            routes=route(is_image) if model.config.visual_expert else None,
            any_images=any_images,
        )


def copied(value: Any, copy: Callable[[Tensor], Tensor]) -> Any:
    """A batch, or a value in it, with a copy of each of its tensors."""
    if isinstance(value, Tensor):
        return copy(value)
    if isinstance(value, dict):
        return {key: copied(each, copy) for key, each in value.items()}
    if isinstance(value, tuple):
        return tuple(copied(each, copy) for each in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changes = {field.name: copied(getattr(value, field.name), copy) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **changes)
    return value


class Objective(nn.Module):
    """The model and its loss as one module, which an engine can wrap."""

    def __init__(self, model: VilaForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the sum of the token losses, and the (N,) token losses, row by row. Both are in nats and fp32.

        The caller divides the sum by the target tokens of the whole global batch. The token losses have no gradients.
        A batch without images skips tower, projector and visual expert, unless another rank runs them. The host waits
        for nothing that the device computes.
        """
        model, device = self.model, batch.input_ids.device
        set_draws(model, batch.draws)
        features = batch.features
        runs_images = self._runs_image_path(batch)
        if batch.pixel_values is not None:
            with span("tower"):
                features = model.tower_features(batch.pixel_values)
        blank = self._blank_features(device) if runs_images and features is None else None
        embeddings = model.embed(batch.input_ids, features, batch.image_tokens)
        if blank is not None:  # its gradients are zeros; ZeRO-3 needs the modules in the order that an image takes
            embeddings = embeddings + model.model.multi_modal_projector(blank)[:0].sum().to(embeddings.dtype)
        routing = {} if batch.routes is None else {"routes": batch.routes if runs_images else None}
        hidden = model.hidden(
            embeddings,
            position_ids=batch.position_ids,
            use_cache=False,
            **attention.document_mask(model, batch.segment_ids, batch.mask),
            **routing,
        ).last_hidden_state
        return losses(model, hidden, batch.targets, batch.labels)

    def _runs_image_path(self, batch: Batch) -> bool:
        """Return whether this rank runs tower, projector and visual expert.

        All ranks run them if one does. Otherwise ranks would wait forever for each other's gradients (ZeRO-1 and 2) or
        weights (ZeRO-3). DeepSpeed also cannot run backward on a loss without gradients.
        """
        return batch.any_images or (torch.distributed.is_initialized() and not self.text_trains)

    @functools.cached_property
    def text_trains(self) -> bool:
        """Whether text alone gives a gradient. Computed in the first pass, after the trained parts were set."""
        named = self.model.named_parameters()
        return any(p.requires_grad and component_of(n) == "language_model" and EXPERT not in n for n, p in named)

    def _blank_features(self, device: torch.device) -> Tensor:
        """(1, P, C) features of a placeholder image."""
        config = self.model.config
        side = config.vision_side
        if any(p.requires_grad for name, p in self.model.named_parameters() if component_of(name) == "vision_tower"):
            return self.model.tower_features(torch.zeros(1, 3, side, side, device=device))
        size = (1, config.grid() ** 2, config.vision_config.hidden_size)
        # Under ZeRO-3, to name a weight here would gather it, on this rank alone.
        return torch.zeros(size, dtype=self.model.dtype, device=device)
