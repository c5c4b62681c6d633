"""The optimizer with its parameter groups, and the learning-rate schedule."""

import math

import torch
from torch import nn

from vila_ops.config import Component, Resources, Stage

Trained = dict[Component, list[tuple[str, nn.Parameter]]]
"""The trained parameters with their names, by part."""


def build_optimizer(stage: Stage, trained: Trained, resources: Resources) -> torch.optim.AdamW:
    """Return AdamW for a stage: one fused kernel, or torch's loop over single parameters."""
    kernel = {"fused": True} if resources.train.optimizer == "fused" else {"fused": False, "foreach": False}
    return torch.optim.AdamW(parameter_groups(stage, trained), betas=stage.betas, **kernel)


def parameter_groups(stage: Stage, trained: Trained) -> list[dict[str, object]]:
    """Return AdamW groups, one per part and kind. Matrices have weight decay; vectors (biases, norms) have none."""
    groups: list[dict[str, object]] = []
    for part, named in trained.items():
        for is_matrix in (True, False):
            parameters = [p for _, p in named if (p.ndim >= 2) == is_matrix]
            if parameters:
                decay = stage.weight_decay if is_matrix else 0.0
                peak = stage.peak_rate(part)
                groups.append({"params": parameters, "lr": peak, "peak": peak, "weight_decay": decay})
    return groups


def lr_multiplier(step: int, stage: Stage, *, num_steps: int) -> float:
    """Return the share of the peak learning rate at `step`, counted from 0.

    The schedule is a linear warm-up, then half a cosine down to `final_ratio` (SGDR, arXiv:1608.03983).
    """
    warmup = math.ceil(stage.warmup_ratio * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return stage.final_ratio + (1 - stage.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
