"""Attention masks, with sliding windows, in the form that each kernel and language model takes."""

# B rows, T query tokens, K key tokens

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from vila_ops.device import has_gpu_kernels
from vila_ops.model.language_models import layer_windows
from vila_ops.model.vila import VilaForConditionalGeneration

Kernel = Literal["sdpa", "flash", "flex"]
NAMES: dict[Kernel, str] = {"sdpa": "sdpa", "flash": "flash_attention_2", "flex": "flex_attention"}
"""transformers' names of the kernels."""
Mask = Callable[[int | None], Any]
"""A sliding window in tokens -> the mask of layers with that window."""


def use(model: VilaForConditionalGeneration, kernel: Kernel) -> None:
    """Set the language model's attention kernel, in place.

    SDPA cannot soft-cap scores, so a model that does (Gemma 2) has all of them in memory instead (`eager`).
    """
    language_model = model.model.language_model
    can = kernel != "sdpa" or language_model._supports_sdpa
    language_model.set_attn_implementation(NAMES[kernel] if can else "eager")


def choose(requested: Literal["auto"] | Kernel, device: torch.device, precision: Literal["fp32", "bf16"]) -> Kernel:
    """The kernel to train with. Raises ValueError if the requested one cannot train on this device."""
    on_gpu, has_flash = has_gpu_kernels(device), find_spec("flash_attn") is not None
    if requested == "auto":
        if not on_gpu:
            return "sdpa"
        return "flash" if has_flash and precision == "bf16" else "flex"
    if requested != "sdpa" and not on_gpu:
        why = "FlashAttention runs on a GPU" if requested == "flash" else "FlexAttention has no backward pass on a CPU"
        raise ValueError(
            f"attention {requested}: {why}, and this stage computes on {device.type}; use auto or sdpa, or set device"
        )
    if requested == "flash" and not has_flash:
        raise ValueError("attention flash needs the package flash-attn; install it, or use auto or flex")
    if requested == "flash" and precision == "fp32":
        raise ValueError("attention flash computes in 16 bits, and the stage's precision is fp32; use auto or flex")
    return requested


def document_mask(model: VilaForConditionalGeneration, segment_ids: Tensor) -> dict[str, Any]:
    """Arguments of the language model with which a token attends to its own segment up to itself.

    segment_ids are (B, T). Padding is a segment like others, so that no softmax is empty. The mask is always explicit:
    transformers infers segments only without a mask and without a cache, and leaks silently otherwise.
    """
    match model.model.language_model.config._attn_implementation:
        case "flash_attention_2":
            return _lengths(segment_ids)  # its layers pass their windows themselves
        case "flex_attention":
            return _by_layer(model, lambda window: _blocks(segment_ids, window))
        case _:
            places = torch.arange(segment_ids.shape[1], device=segment_ids.device)
            return masks(model, attention_mask(segment_ids), (places[:, None] - places)[None, None])


def attention_mask(segment_ids: Tensor) -> Tensor:
    """Block-diagonal causal mask (B, 1, T, T) of segment ids (B, T): True where a query attends to a key."""
    return (segment_ids[:, None, :, None] == segment_ids[:, None, None, :]).tril()


def masks(model: VilaForConditionalGeneration, attends: Tensor, distance: Tensor) -> dict[str, Any]:
    """Arguments of the language model for queries that attend to keys where `attends` (B, 1, T, K) is True.

    distance, which broadcasts to it, is the query's position minus the key's. A layer with a sliding window of W tokens
    attends to keys at distances below W only.
    """

    def mask(window: int | None) -> Tensor:
        seen = attends if window is None else attends & (distance < window)
        if model.model.language_model.config._attn_implementation == "sdpa":
            return seen
        return torch.zeros_like(seen, dtype=torch.float32).masked_fill(~seen, torch.finfo(torch.float32).min)

    return _by_layer(model, mask)


def _by_layer(model: VilaForConditionalGeneration, mask: Mask) -> dict[str, Any]:
    windows = layer_windows(model.config.text_config)
    if isinstance(windows, dict):
        return {"attention_mask": {kind: mask(window) for kind, window in windows.items()}}
    return {"attention_mask": mask(windows)}


def _blocks(segment_ids: Tensor, window: int | None) -> Any:
    """The same mask for FlexAttention, as blocks of 128 x 128 that are computed or skipped."""

    def attends(row: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (query >= key) & (segment_ids[row, query] == segment_ids[row, key])
        return seen if window is None else seen & (query - key < window)

    rows, tokens = segment_ids.shape
    return create_block_mask(attends, rows, None, tokens, tokens, device=str(segment_ids.device))


def _lengths(segment_ids: Tensor) -> dict[str, Any]:
    """The same mask for FlashAttention: the bounds of segments in all rows end to end (`flash_attn_varlen_func`).

    `deterministic` fixes the order of additions in the backward pass; without it a resumed loss curve would differ.
    """
    starts = torch.ones_like(segment_ids, dtype=torch.bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    positions = starts.flatten().nonzero()[:, 0]
    bounds = torch.nn.functional.pad(positions, (0, 1), value=segment_ids.numel()).to(torch.int32)
    longest = int(bounds.diff().max())
    ends = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    return {**ends, "deterministic": True}
