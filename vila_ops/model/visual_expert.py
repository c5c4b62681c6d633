"""The visual expert (the paper's Table 8, after CogVLM): a second set of QKV and FFN weights for image tokens.

A text position goes through the language model's weights and an image position through the expert's. Attention and its
output projection are shared, so that positions of both kinds attend to each other. Positions are sorted by kind, and
each goes through one matrix product only.
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

from vila_ops.model.layer_classes import mixed
from vila_ops.model.trainable import EXPERT

QKV = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Routes:
    """Which positions of a forward pass are image tokens."""

    order: Tensor
    """(N,): indices of text positions, then of image positions."""
    back: Tensor
    """(N,): the place of each position in `order`."""
    num_text: int


def route(is_image: Tensor) -> Routes:
    """The routes of a forward pass from the kinds of its positions, (B, T) bool."""
    flat = is_image.flatten()
    order = flat.to(torch.uint8).argsort(stable=True)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return Routes(order, back, len(flat) - int(flat.sum()))


_current: ContextVar[Routes | None] = ContextVar("routes")
"""The routes of the decoder layer that this thread runs; the layer sets them during its forward pass.

They are an argument of the layer, so recomputation sets them again in any thread.
"""


@contextmanager
def _routed(routes: Routes | None) -> Iterator[None]:
    token = _current.set(routes)
    try:
        yield
    finally:
        _current.reset(token)


class RoutedLinear(nn.Linear):
    """A linear layer that keeps its name and weights for text positions; its child `image` has those for images."""

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
    """Mixin for a decoder layer's class: takes the routes that the model passes to its layers."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's forward pass with `routes`; None: no position is an image token."""
        if "routes" not in kwargs:
            raise ValueError(
                "a language model with a visual expert needs to know which positions are image tokens; "
                "call the whole model with input_ids"
            )
        with _routed(kwargs.pop("routes")):
            return super().forward(*args, **kwargs)


def add_visual_expert(decoder: nn.Module) -> None:
    """Add an expert that is a copy of the decoder's weights, in place.

    Raises ValueError for a layer that lacks what Llama's has: separate q, k and v, and an MLP of linear layers.
    """
    for layer in _layers(decoder):
        for parent, name in _linears(layer):
            setattr(parent, name, RoutedLinear(getattr(parent, name)))
        layer.__class__ = mixed(RoutedLayer, type(layer))


def _layers(decoder: nn.Module) -> nn.ModuleList:
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(
            f"{type(decoder).__name__} has no list `layers`; a visual expert needs a decoder such as Llama's"
        )
    return layers


def _linears(layer: nn.Module) -> list[tuple[nn.Module, str]]:
    """The linear layers that an expert copies, each as its parent module and its name there."""
    attention: nn.Module = getattr(layer, "self_attn", None) or nn.Module()
    mlp: nn.Module = getattr(layer, "mlp", None) or nn.Module()
    missing = [f"self_attn.{name}" for name in QKV if not isinstance(getattr(attention, name, None), nn.Linear)]
    inner = [(m, name) for m in mlp.modules() for name, c in m.named_children() if _is_linear(c)]
    doubled = {id(p) for parent, name in inner for p in getattr(parent, name).parameters()}
    if not inner or any(id(p) not in doubled for p in mlp.parameters()):
        missing.append("an mlp of linear layers only")
    if missing:
        raise ValueError(
            f"{type(layer).__name__} lacks {missing}, which a visual expert copies; "
            "use a language model with separate q, k and v (Llama, Mistral, Qwen2), or another tuning"
        )
    return [*((attention, name) for name in QKV), *inner]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def expert_names(config: PretrainedConfig) -> list[str]:
    """Names of the expert's tensors in a decoder of this config: the originals', with EXPERT for the last `.`."""
    with torch.device("meta"):
        decoder = AutoModel.from_config(config)
        add_visual_expert(decoder)
    return [name for name in decoder.state_dict() if EXPERT in name]


def expert_parameters(decoder: nn.Module) -> int | None:
    """Number of parameters that an expert adds to a decoder; None for a decoder that cannot have one."""
    try:
        linears = [pair for layer in _layers(decoder) for pair in _linears(layer)]
    except ValueError:
        return None
    originals: list[nn.Module] = [getattr(parent, name) for parent, name in linears]
    return sum(weight.numel() for linear in originals for weight in linear.parameters())
