"""Attention of a pass whose rows have different numbers of new tokens.

All new tokens of a pass lie end to end in one row, so that every linear layer computes them at once and without much
padding: a pass that adds a token to many answers also reads a piece of a prompt, and goes through the weights once.
Only attention tells rows apart. The cache gives it their keys and values (`RowStates`), and one tensor holds the masks
of all groups, because transformers hands a mask of four dimensions to the layers unchanged.
"""

# R rows of a group, Q new tokens of a row, W key positions of a row, H heads, K head dim, T new tokens of all groups

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from vila_ops.model.attention import by_layer
from vila_ops.model.vila import VilaForConditionalGeneration

NAME = "vila_ops_rows"
"""Our name of `row_attention` in transformers."""


@dataclass(frozen=True)
class RowStates:
    """Keys or values of the rows of a pass, by groups of rows with the same number of new tokens."""

    groups: list[Tensor]
    """(R, H, W, K) of each group."""
    new: list[int]
    """Q of each group."""


def row_attention(
    module: nn.Module,
    query: Tensor,
    key: RowStates,
    value: RowStates,
    attention_mask: Tensor,
    *,
    scaling: float,
    **more: Any,
) -> tuple[Tensor, None]:
    """The result (1, T, H, K) of queries (1, H, T, K), for transformers' layers; the mask is that of `masks`."""
    shapes = [(len(keys), new, keys.shape[2]) for keys, new in zip(key.groups, key.new, strict=True)]
    queries = torch.split(query[0], [rows * new for rows, new, _ in shapes], dim=1)
    seen = torch.split(attention_mask.flatten(), [rows * new * width for rows, new, width in shapes])
    parts = []
    for q, k, v, mask, (rows, new, width) in zip(queries, key.groups, value.groups, seen, shapes, strict=True):
        states = torch.unflatten(q, 1, (rows, new)).transpose(0, 1), k, v, mask.view(rows, 1, new, width)
        if (softcap := more.get("softcap")) is None:
            out = sdpa_attention_forward(module, *states, scaling=scaling)[0]
        else:
            out = _capped(*states, scaling=scaling, softcap=softcap)
        parts.append(out.flatten(0, 1))
    return torch.cat(parts)[None], None


def _capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scaling: float, softcap: float) -> Tensor:
    """(R, Q, H, K): attention whose scores are c tanh(score / c), as Gemma 2's, which SDPA cannot compute."""
    groups = q.shape[1] // k.shape[1]
    scores = q @ repeat_kv(k, groups).mT * scaling
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, -torch.inf)
    out: Tensor = scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ repeat_kv(v, groups)
    return out.transpose(1, 2)


def masks(model: VilaForConditionalGeneration, distances: Sequence[Tensor]) -> dict[str, Any]:
    """Arguments of the language model for distances (R, Q, W) of each group: each query's position minus each key's.

    A query attends to keys at distances of 0 and more, in a layer with a sliding window below its size.
    """

    def mask(window: int | None) -> Tensor:
        seen = [distance >= 0 if window is None else (distance >= 0) & (distance < window) for distance in distances]
        return torch.cat([one.flatten() for one in seen])[None, None, None]

    return by_layer(model, mask)


@contextmanager
def used_by(model: VilaForConditionalGeneration) -> Iterator[None]:
    """Let the language model's layers attend by `row_attention`."""
    config = model.model.language_model.config
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


AttentionInterface.register(NAME, row_attention)
