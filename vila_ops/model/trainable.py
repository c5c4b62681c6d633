"""Which parameters a stage trains."""

import logging
from typing import assert_never

import torch
from torch import Tensor, nn

from vila_ops.config import Component
from vila_ops.config.train import FullTuning, Lora, Tuning, VisualExpert

LORA = ".lora_"
"""Part of the name of every adapter parameter."""
EXPERT = ".image."
"""Part of the name of every parameter of a visual expert."""
log = logging.getLogger(__name__)


def set_trainable(
    model: nn.Module, components: tuple[Component, ...], tuning: Tuning | None = None
) -> dict[Component, list[tuple[str, nn.Parameter]]]:
    """Freeze every parameter that the stage does not train; return the others by component, in the model's order."""
    trained: dict[Component, list[tuple[str, nn.Parameter]]] = {component: [] for component in components}
    total = 0
    for name, parameter in model.named_parameters():
        trains = _trains(name, components, tuning or FullTuning())
        parameter.requires_grad_(trains)
        total += parameter.numel()
        if trains:
            trained[component_of(name)].append((name, parameter))
    counts = {component: sum(p.numel() for _, p in named) for component, named in trained.items()}
    parts = ", ".join(f"{component} {count:,}" for component, count in counts.items())
    log.info("trains %s of %s parameters", parts, f"{total:,}")
    return trained


def compute_in(
    dtype: torch.dtype, model: nn.Module, trained: dict[Component, list[tuple[str, nn.Parameter]]]
) -> dict[str, Tensor]:
    """Cast every parameter to the dtype that it computes in, in place.

    Returns the fp32 values of those that train, by name, which are their master weights; {} if they compute in fp32.
    Buffers keep their dtype: rotary frequencies are too coarse in bf16.
    """
    masters = {name: parameter.data for named in trained.values() for name, parameter in named}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return {} if dtype == torch.float32 else masters


def component_of(name: str) -> Component:
    """The component that a parameter belongs to, by its name in the whole model."""
    if "vision_tower." in name:
        return "vision_tower"
    return "projector" if "multi_modal_projector." in name else "language_model"


def _trains(name: str, components: tuple[Component, ...], tuning: Tuning) -> bool:
    component = component_of(name)
    return component in components and (component != "language_model" or _tuned(name, tuning))


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
