"""The visual expert (the paper's Table 8, after CogVLM): a second set of QKV and FFN weights for image tokens.

A text position goes through the language model's own weights and an image position through the expert's; attention
itself and its output projection are shared, so that both kinds see each other. Rows are sorted by kind and each goes
through one product only: no position is computed twice.
"""

# B rows, T tokens, N = B T positions, D width

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig

from vila_ops.model.trainable import EXPERT

QKV = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Routes:
    """Which positions of a pass are image tokens."""

    order: Tensor
    """(N,): the positions of text, then those of images."""
    back: Tensor
    """(N,): where each position stands in `order`."""
    num_text: int


def route(is_image: Tensor) -> Routes:
    """The routes of a pass from the kinds of its positions, (B, T) bool."""
    flat = is_image.flatten()
    order = flat.to(torch.uint8).argsort(stable=True)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return Routes(order, back, len(flat) - int(flat.sum()))


_current: ContextVar[Routes | None] = ContextVar("routes")
"""The routes of the decoder layer that this thread is running; set by the layer, for the time of its forward pass.

The layer has them as an argument, so a gradient checkpoint that runs it again, in whatever thread, sets them again.
"""


@contextmanager
def _routed(routes: Routes | None) -> Iterator[None]:
    token = _current.set(routes)
    try:
        yield
    finally:
        _current.reset(token)


class RoutedLinear(nn.Linear):
    """A linear layer that keeps its name and weights for text, with another one, `image`, for image positions."""

    def __init__(self, linear: nn.Linear) -> None:
        old = linear.weight
        shape = (linear.in_features, linear.out_features, linear.bias is not None)
        super().__init__(*shape, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.image = nn.Linear(*shape, device="meta", dtype=old.dtype).to_empty(device=old.device)
        if not old.is_meta:
            self.image.load_state_dict(linear.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D'), each position through the weights of its kind."""
        routes = _current.get()
        if routes is None:
            return super().forward(x)
        sorted_ND = x.flatten(0, -2).index_select(0, routes.order)
        text = super().forward(sorted_ND[: routes.num_text])
        image = self.image(sorted_ND[routes.num_text :])
        return torch.cat([text, image]).index_select(0, routes.back).view(*x.shape[:-1], -1)


class RoutedLayer(nn.Module):
    """Mixed into a decoder layer's class: takes the routes that the model hands down to its layers."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward pass, with `routes` (None: no image token) in force."""
        if "routes" not in kwargs:
            raise ValueError(
                "a language model with a visual expert has to know which positions are image tokens: "
                "call the whole model with input_ids"
            )
        with _routed(kwargs.pop("routes")):
            return super().forward(*args, **kwargs)


def add_visual_expert(decoder: nn.Module) -> None:
    """Give a decoder an expert that is a copy of its own weights.

    Raises ValueError where a layer has not the parts of a Llama: separate q, k and v, and an MLP of linear layers.
    """
    for layer in _layers(decoder):
        for parent, name in _linears(layer):
            setattr(parent, name, RoutedLinear(getattr(parent, name)))
        kind = type(layer)
        layer.__class__ = type(kind.__name__, (RoutedLayer, kind), {"__module__": kind.__module__})


def _layers(decoder: nn.Module) -> nn.ModuleList:
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{type(decoder).__name__} has no list `layers`; a visual expert needs a decoder like Llama's")
    return layers


def _linears(layer: nn.Module) -> list[tuple[nn.Module, str]]:
    """The linear layers that get a twin, as the module that holds each and its name there."""
    attention: nn.Module = getattr(layer, "self_attn", None) or nn.Module()
    mlp: nn.Module = getattr(layer, "mlp", None) or nn.Module()
    missing = [f"self_attn.{name}" for name in QKV if not isinstance(getattr(attention, name, None), nn.Linear)]
    inner = [(m, name) for m in mlp.modules() for name, c in m.named_children() if _is_linear(c)]
    doubled = {id(p) for parent, name in inner for p in getattr(parent, name).parameters()}
    if not inner or any(id(p) not in doubled for p in mlp.parameters()):
        missing.append("an mlp of linear layers alone")
    if missing:
        raise ValueError(
            f"{type(layer).__name__} has not {missing}, which a visual expert doubles; "
            "use a language model with separate q, k and v (Llama, Mistral, Qwen2), or another tuning"
        )
    return [*((attention, name) for name in QKV), *inner]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def expert_names(config: PretrainedConfig) -> list[str]:
    """The expert's tensors in the state of a decoder of this config; each is EXPERT for `.` away from its original."""
    with torch.device("meta"):
        decoder = AutoModel.from_config(config)
        add_visual_expert(decoder)
    return [name for name in decoder.state_dict() if EXPERT in name]


def expert_parameters(decoder: nn.Module) -> int | None:
    """How many parameters an expert adds to a decoder; None where the decoder can have none."""
    try:
        linears = [pair for layer in _layers(decoder) for pair in _linears(layer)]
    except ValueError:
        return None
    twins: list[nn.Module] = [getattr(parent, name) for parent, name in linears]
    return sum(weight.numel() for linear in twins for weight in linear.parameters())
