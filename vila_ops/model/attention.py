"""Attention masks, with sliding windows, in the form that each kernel and language model takes.

What depends on the lengths of segments is computed on the host (`plan`), because a device could say them only after it
has done all its work; `document_mask` makes the mask of it on the device.
"""

# B rows, T query tokens, K key tokens, Q blocks of a row

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv

from vila_ops.device import has_gpu_kernels
from vila_ops.model.language_models import layer_windows
from vila_ops.model.vila import VilaForConditionalGeneration

Kernel = Literal["sdpa", "varlen", "flash", "flex"]
VARLEN = "vila_ops_varlen"
"""Our name of `varlen_attention` in transformers."""
NAMES: dict[Kernel, str] = {
    "sdpa": "sdpa", "varlen": VARLEN, "flash": "flash_attention_2", "flex": "flex_attention"
}  # fmt: skip
"""transformers' names of the kernels."""
Mask = Callable[[int | None], Any]
"""A sliding window in tokens -> the mask of layers with that window."""
BLOCK = 128
"""Tokens of a side of FlexAttention's blocks."""


@dataclass(frozen=True)
class SegmentBounds:
    """The segments of all rows end to end, for FlashAttention."""

    starts: Tensor
    """(S + 1,) int32: the position at which each of the S segments begins, then the number of all positions."""
    longest: int
    """Tokens of the longest segment."""


@dataclass(frozen=True)
class SegmentLengths:
    """The segments of all rows end to end, for SDPA on one after the other."""

    tokens: tuple[int, ...]
    """Tokens of each segment."""


@dataclass(frozen=True)
class Blocks:
    """Which blocks of BLOCK x BLOCK attend, for FlexAttention: some pairs of a block (partial), or all of them (full).

    For each block of queries (kv) and of keys (q): how many blocks, (B, 1, Q), and their numbers first in (B, 1, Q, Q).
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor
    q_num_blocks: Tensor
    q_indices: Tensor
    full_q_num_blocks: Tensor
    full_q_indices: Tensor


MaskPlan = SegmentBounds | SegmentLengths | dict[int | None, Blocks] | None
"""What the kernel needs besides segment ids: bounds for flash, lengths for varlen, the blocks of each window for flex,
nothing for sdpa."""


def use(model: VilaForConditionalGeneration, kernel: Kernel) -> None:
    """Set the language model's attention kernel, in place.

    SDPA cannot soft-cap scores, so a model that does (Gemma 2) has all of them in memory instead (`eager`).
    """
    language_model = model.model.language_model
    can = kernel not in ("sdpa", "varlen") or language_model._supports_sdpa
    language_model.set_attn_implementation(NAMES[kernel] if can else "eager")


def choose(
    requested: Literal["auto"] | Kernel,
    device: torch.device,
    precision: Literal["fp32", "bf16"],
    *,
    compiled: bool = False,
) -> Kernel:
    """The kernel to train with; `compiled` says whether the layers are compiled, for which varlen has a shape for each
    row. Raises ValueError if the requested one cannot train on this device."""
    on_gpu, has_flash = has_gpu_kernels(device), find_spec("flash_attn") is not None
    if requested == "auto":
        if not on_gpu:
            return "varlen" if device.type == "cpu" and not compiled else "sdpa"
        return "flash" if has_flash and precision == "bf16" else "flex"
    if requested == "varlen" and (compiled or device.type != "cpu"):
        where = "with compile: true" if compiled else f"on {device.type}"
        raise ValueError(
            f"attention varlen computes one document after the other, which {where} is slower than the mask of all of "
            f"them; use auto or sdpa"
        )
    if requested in ("flash", "flex") and not on_gpu:
        why = "FlashAttention runs on a GPU" if requested == "flash" else "FlexAttention has no backward pass on a CPU"
        raise ValueError(
            f"attention {requested}: {why}, and this stage computes on {device.type}; use auto or sdpa, or set device"
        )
    if requested == "flash" and not has_flash:
        raise ValueError("attention flash needs the package flash-attn; install it, or use auto or flex")
    if requested == "flash" and precision == "fp32":
        raise ValueError("attention flash computes in 16 bits, and the stage's precision is fp32; use auto or flex")
    return requested


def plan(model: VilaForConditionalGeneration, segment_ids: Tensor) -> MaskPlan:
    """The plan of `document_mask` for segment ids (B, T) in the host's memory, in which a segment is one run."""
    match model.model.language_model.config._attn_implementation:
        case "flash_attention_2":
            return _bounds(segment_ids)
        case name if name == VARLEN:
            return SegmentLengths(tuple(_bounds(segment_ids).starts.diff().tolist()))
        case "flex_attention":
            windows = layer_windows(model.config.text_config)
            each = set(windows.values()) if isinstance(windows, dict) else {windows}
            return {window: _blocks(segment_ids, window) for window in each}
        case _:
            return None


def document_mask(model: VilaForConditionalGeneration, segment_ids: Tensor, planned: MaskPlan) -> dict[str, Any]:
    """Arguments of the language model with which a token attends to its own segment up to itself.

    segment_ids are (B, T), and `planned` is their plan on the same device. Padding is a segment like others, so that no
    softmax is empty. The mask is always explicit: transformers infers segments only without a mask and without a cache,
    and leaks silently otherwise.
    """
    match planned:
        case SegmentBounds(starts, longest):  # the layers pass their windows themselves
            # Without `deterministic`, the order of additions in the backward pass, and a resumed curve, would differ.
            ends = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
            return {**ends, "max_length_q": longest, "max_length_k": longest, "deterministic": True}
        case SegmentLengths(tokens):  # a mask of four dimensions reaches the layers unchanged
            lengths = torch.tensor(tokens).view(1, 1, 1, -1)
            return by_layer(model, lambda window: lengths)
        case dict():
            return by_layer(model, lambda window: _block_mask(segment_ids, window, planned[window]))
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

    return by_layer(model, mask)


def by_layer(model: VilaForConditionalGeneration, mask: Mask) -> dict[str, Any]:
    """Arguments of the language model with the mask of each kind of layer, by its sliding window."""
    windows = layer_windows(model.config.text_config)
    if isinstance(windows, dict):
        return {"attention_mask": {kind: mask(window) for kind, window in windows.items()}}
    return {"attention_mask": mask(windows)}


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each segment, for transformers' layers; nothing of a masked pair is computed.

    query is (B, H, T, D), key and value (B, H / groups, T, D), the result (B, T, H, D). The last dimension of
    attention_mask has the tokens of each segment, rows end to end.
    """
    rows, heads, tokens, _ = query.shape
    groups, lengths = heads // key.shape[1], attention_mask.flatten().tolist()
    joined = (
        state.transpose(0, 1).reshape(heads, rows * tokens, -1).split(lengths, dim=1)
        for state in (query, repeat_kv(key, groups), repeat_kv(value, groups))
    )
    parts = [
        scaled_dot_product_attention(
            q[None], k[None], v[None],
            attn_mask=_window_mask(q.shape[1], sliding_window),
            is_causal=sliding_window is None or q.shape[1] <= sliding_window,
            dropout_p=more.get("dropout", 0.0), scale=more.get("scaling"),
        )[0]
        for q, k, v in zip(*joined, strict=True)
    ]  # fmt: skip
    return torch.cat(parts, dim=1).view(heads, rows, tokens, -1).permute(1, 2, 0, 3).contiguous(), None


def _window_mask(tokens: int, window: int | None) -> Tensor | None:
    """Causal mask (T, T) of a sliding window that is shorter than the segment; None for others."""
    if window is None or tokens <= window:
        return None
    return torch.ones(tokens, tokens, dtype=torch.bool).tril().triu(1 - window)


AttentionInterface.register(VARLEN, varlen_attention)


def _block_mask(segment_ids: Tensor, window: int | None, blocks: Blocks) -> BlockMask:
    """The same mask for FlexAttention, as blocks that are computed or skipped."""

    def attends(row: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (query >= key) & (segment_ids[row, query] == segment_ids[row, key])
        return seen if window is None else seen & (query - key < window)

    tokens = segment_ids.shape[1]
    return BlockMask(seq_lengths=(tokens, tokens), **vars(blocks), BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=attends)


def _blocks(segment_ids: Tensor, window: int | None) -> Blocks:
    """The blocks of a mask, from the segments of the first and last token of each block.

    A segment that reaches from one block into a later one ends the first and begins the second.
    """
    tokens = segment_ids.shape[1]
    starts = torch.arange(0, tokens, BLOCK)
    lasts = (starts + BLOCK - 1).clamp(max=tokens - 1)
    first, last = segment_ids[:, starts], segment_ids[:, lasts]  # (B, Q)
    nearest = starts[:, None] - lasts[None]  # (Q, Q): tokens from the last key of a block to the first query of another
    within = torch.tensor(True) if window is None else nearest < window
    diagonal = torch.eye(len(starts), dtype=torch.bool)
    some = (nearest > 0) & within & (first[:, :, None] == last[:, None, :]) | diagonal
    is_one = (first == last) & (lasts - starts == BLOCK - 1)  # a whole block of one segment
    farthest = lasts[:, None] - starts[None]
    within = torch.tensor(True) if window is None else farthest < window
    full = some & ~diagonal & within & is_one[:, :, None] & is_one[:, None, :]
    partial = some & ~full
    return Blocks(*_numbered(partial), *_numbered(full), *_numbered(partial.mT), *_numbered(full.mT))


def _numbered(dense: Tensor) -> tuple[Tensor, Tensor]:
    """Number and numbers, in ascending order, of the true columns of each row, as BlockMask has them."""
    order = dense.to(torch.int8).contiguous().argsort(dim=-1, descending=True, stable=True)
    return dense.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]


def _bounds(segment_ids: Tensor) -> SegmentBounds:
    starts = torch.ones_like(segment_ids, dtype=torch.bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    positions = starts.flatten().nonzero()[:, 0]
    bounds = torch.nn.functional.pad(positions, (0, 1), value=segment_ids.numel()).to(torch.int32)
    return SegmentBounds(bounds, int(bounds.diff().max()))
