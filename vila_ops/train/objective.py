"""What a training step differentiates: the summed loss of some packed rows."""

# B rows, T tokens, I images, P patches, C tower channels, S side in pixels

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vila_ops.model.lora import set_draws
from vila_ops.model.vila import VilaForConditionalGeneration, losses


@dataclass(frozen=True)
class Batch:
    """One micro-batch on its device."""

    input_ids: Tensor
    """(B, T)"""
    position_ids: Tensor
    """(B, T), from 0 in each sample."""
    mask: Tensor
    """(B, 1, T, T) bool."""
    labels: Tensor
    """(B, T), IGNORE_INDEX where nothing is learnt."""
    features: Tensor | None
    """(I, P, C) of a frozen tower; None without pictures."""
    pixel_values: Tensor | None
    """(I, 3, S, S) for a tower that trains; None without pictures."""
    draws: tuple[int, ...] | None = None
    """(B,) what dropout of each row draws from; None: no dropout."""


class Objective(nn.Module):
    """The model with its loss, as one module that an engine can wrap."""

    def __init__(self, model: VilaForConditionalGeneration, *, bf16: bool) -> None:
        super().__init__()
        self.model = model
        self.bf16 = bf16

    def forward(self, batch: Batch) -> Tensor:
        """Sum of the token losses in nats, fp32; divide by the tokens of the whole global step."""
        device = batch.input_ids.device.type
        set_draws(self.model, batch.draws)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.bf16):
            features = batch.features
            if batch.pixel_values is not None:
                features = self.model.tower_features(batch.pixel_values)
            embeddings = self.model.embed(batch.input_ids, features)
            if features is None:
                # Every rank must give every gradient, or ZeRO's reductions would wait for each other for ever.
                blank = self.model.model.multi_modal_projector(self._blank(batch.input_ids.device))
                embeddings = embeddings + 0.0 * blank.sum().to(embeddings.dtype)
            hidden = self.model.hidden(
                embeddings, position_ids=batch.position_ids, attention_mask=batch.mask, use_cache=False
            ).last_hidden_state
            total = losses(self.model, hidden, batch.labels).sum()
        return total

    def _blank(self, device: torch.device) -> Tensor:
        """Features of no picture, for rows that have none."""
        config = self.model.config
        side = config.vision_side
        if any(p.requires_grad for p in self.model.model.vision_tower.parameters()):
            return self.model.tower_features(torch.zeros(1, 3, side, side, device=device))
        return torch.zeros(1, config.grid() ** 2, config.vision_config.hidden_size, device=device)
