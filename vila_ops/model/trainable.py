"""Which parameters train in a stage."""

import logging
from typing import assert_never

import torch
from torch import nn

from vila_ops.config import Part
from vila_ops.config.train import FullTuning, Lora, Tuning, VisualExpert

LORA = ".lora_"
"""In the name of an adapter's parameter."""
EXPERT = ".image."
"""In the name of a visual expert's parameter."""
log = logging.getLogger(__name__)


def set_trainable(
    model: nn.Module, parts: tuple[Part, ...], tuning: Tuning | None = None
) -> dict[Part, list[tuple[str, nn.Parameter]]]:
    """Freeze everything but what trains; returns the trained parameters by part, in the model's order."""
    trained: dict[Part, list[tuple[str, nn.Parameter]]] = {part: [] for part in parts}
    total = 0
    for name, parameter in model.named_parameters():
        part = part_of(name)
        trains = _trains(name, parts, tuning or FullTuning())
        parameter.requires_grad_(trains)
        total += parameter.numel()
        if trains:
            trained[part].append((name, parameter))
    counts = {part: sum(p.numel() for _, p in found) for part, found in trained.items()}
    log.info("trainable %s of %d parameters", counts, total)
    return trained


def keep_frozen_in(dtype: torch.dtype, model: nn.Module, parts: tuple[Part, ...], tuning: Tuning) -> None:
    """Keep the language model's frozen parameters in the dtype that it computes in: they need no fp32 master.

    Buffers stay: rotary frequencies are too coarse in bf16.
    """
    for name, parameter in model.named_parameters():
        if part_of(name) == "language_model" and not _trains(name, parts, tuning):
            parameter.data = parameter.data.to(dtype)


def part_of(name: str) -> Part:
    """The part that a parameter belongs to, by its name in the whole model."""
    if "vision_tower." in name:
        return "vision_tower"
    return "projector" if "multi_modal_projector." in name else "language_model"


def _trains(name: str, parts: tuple[Part, ...], tuning: Tuning) -> bool:
    part = part_of(name)
    return part in parts and (part != "language_model" or _tuned(name, tuning))


def _tuned(name: str, tuning: Tuning) -> bool:
    """Whether a parameter of the language model trains."""
    match tuning:
        case FullTuning():
            return True
        case Lora():
            return LORA in name
        case VisualExpert():
            return EXPERT in name
        case _:
            assert_never(tuning)
