"""What a training step differentiates: the summed loss of some packed rows."""

# B rows, T tokens, I images, P patches, C tower channels, S side in pixels

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vila_ops.model.attention import document_mask
from vila_ops.model.lora import set_draws
from vila_ops.model.trainable import EXPERT, part_of
from vila_ops.model.vila import VilaForConditionalGeneration, losses


@dataclass(frozen=True)
class Batch:
    """One micro-batch on its device."""

    input_ids: Tensor
    """(B, T)"""
    position_ids: Tensor
    """(B, T), from 0 in each sample."""
    segment_ids: Tensor
    """(B, T), by sample."""
    labels: Tensor
    """(B, T), IGNORE_INDEX where nothing is learnt."""
    features: Tensor | None
    """(I, P, C) of a frozen tower; None without images."""
    pixel_values: Tensor | None
    """(I, 3, S, S) for a tower that trains; None without images."""
    draws: tuple[int, ...] | None = None
    """(B,) what dropout of each row draws from; None: no dropout."""


class Objective(nn.Module):
    """The model with its loss, as one module that an engine can wrap."""

    def __init__(self, model: VilaForConditionalGeneration, *, bf16: bool) -> None:
        super().__init__()
        self.model = model
        self.bf16 = bf16

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum of the token losses in nats, fp32, to divide by the tokens of the whole global step; and those losses.

        The latter are (N,), without gradients, of the labels that are not negative, row by row.

        Of a batch without images neither tower nor projector nor a visual expert is run, unless another rank runs it.
        """
        model, device = self.model, batch.input_ids.device
        set_draws(model, batch.draws)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.bf16):
            features = batch.features
            joins = self._joins(features is not None or batch.pixel_values is not None, device)
            if batch.pixel_values is not None:
                features = model.tower_features(batch.pixel_values)
            blank = self._blank(device) if joins and features is None else None
            embeddings = model.embed(batch.input_ids, features)
            if blank is not None:  # its gradients are zeros; run in the order of an image, as ZeRO-3 gathers weights
                embeddings = embeddings + model.model.multi_modal_projector(blank)[:0].sum().to(embeddings.dtype)
            hidden = model.hidden(
                embeddings,
                position_ids=batch.position_ids,
                use_cache=False,
                **document_mask(model, batch.segment_ids),
                **model.routing(batch.input_ids, everywhere=joins),
            ).last_hidden_state
            return losses(model, hidden, batch.labels)

    def _joins(self, has_images: bool, device: torch.device) -> bool:
        """Whether this rank runs what images pass through: where one rank does, all must.

        They would wait for each other's gradients (ZeRO-1 and 2) or weights (ZeRO-3) for ever.
        """
        if not torch.distributed.is_initialized():
            return has_images
        anyone = torch.tensor(float(has_images), device=device)
        torch.distributed.all_reduce(anyone, op=torch.distributed.ReduceOp.MAX)
        return bool(anyone) or not self.text_trains  # DeepSpeed has no backward pass of a loss without gradients

    @functools.cached_property
    def text_trains(self) -> bool:
        """Whether text alone gives a gradient. Read once, in the first pass, when it is settled what trains."""
        named = self.model.named_parameters()
        return any(p.requires_grad and part_of(n) == "language_model" and EXPERT not in n for n, p in named)

    def _blank(self, device: torch.device) -> Tensor:
        """Features of an image that is none."""
        config = self.model.config
        side = config.vision_side
        if any(p.requires_grad for name, p in self.model.named_parameters() if part_of(name) == "vision_tower"):
            return self.model.tower_features(torch.zeros(1, 3, side, side, device=device))
        return torch.zeros(1, config.grid() ** 2, config.vision_config.hidden_size, device=device)
