"""The training objective: the summed token loss of a micro-batch of packed rows."""

# B rows, T tokens, N target tokens, I images, P patches, C tower channels, S side in pixels

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vila_ops.model.attention import document_mask
from vila_ops.model.lora import set_draws
from vila_ops.model.trainable import EXPERT, component_of
from vila_ops.model.vila import VilaForConditionalGeneration, losses


@dataclass(frozen=True)
class Batch:
    """One micro-batch on its device."""

    input_ids: Tensor
    """(B, T)"""
    position_ids: Tensor
    """(B, T), counted from 0 in each sample."""
    segment_ids: Tensor
    """(B, T), the number of the sample in its row, from 1; 0 is padding."""
    labels: Tensor
    """(B, T), the token to predict at each position, or IGNORE_INDEX."""
    features: Tensor | None
    """(I, P, C), features of a frozen tower. None without images."""
    pixel_values: Tensor | None
    """(I, 3, S, S), pixels for a tower that trains. None without images."""
    draws: tuple[int, ...] | None = None
    """(B,), the seed of each row's dropout. None: no dropout."""


class Objective(nn.Module):
    """The model and its loss as one module, which an engine can wrap."""

    def __init__(self, model: VilaForConditionalGeneration, *, bf16: bool) -> None:
        super().__init__()
        self.model = model
        self.bf16 = bf16

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the sum of the token losses, and the (N,) token losses, row by row. Both are in nats and fp32.

        The caller divides the sum by the target tokens of the whole global batch. The token losses have no gradients.
        A batch without images skips tower, projector and visual expert, unless another rank runs them.
        """
        model, device = self.model, batch.input_ids.device
        set_draws(model, batch.draws)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.bf16):
            features = batch.features
            runs_images = self._runs_image_path(features is not None or batch.pixel_values is not None, device)
            if batch.pixel_values is not None:
                features = model.tower_features(batch.pixel_values)
            blank = self._blank_features(device) if runs_images and features is None else None
            embeddings = model.embed(batch.input_ids, features)
            if blank is not None:  # its gradients are zeros; ZeRO-3 needs the modules in the order that an image takes
                embeddings = embeddings + model.model.multi_modal_projector(blank)[:0].sum().to(embeddings.dtype)
            hidden = model.hidden(
                embeddings,
                position_ids=batch.position_ids,
                use_cache=False,
                **document_mask(model, batch.segment_ids),
                **model.routing(batch.input_ids, everywhere=runs_images),
            ).last_hidden_state
            return losses(model, hidden, batch.labels)

    def _runs_image_path(self, has_images: bool, device: torch.device) -> bool:
        """Return whether this rank runs tower, projector and visual expert.

        All ranks run them if one does. Otherwise ranks would wait forever for each other's gradients (ZeRO-1 and 2) or
        weights (ZeRO-3).
        """
        if not torch.distributed.is_initialized():
            return has_images
        any_rank = torch.tensor(float(has_images), device=device)
        torch.distributed.all_reduce(any_rank, op=torch.distributed.ReduceOp.MAX)
        return bool(any_rank) or not self.text_trains  # DeepSpeed cannot run backward on a loss without gradients

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
        return torch.zeros(1, config.grid() ** 2, config.vision_config.hidden_size, device=device)
