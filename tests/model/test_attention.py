import re
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import cross_entropy
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from vila_ops.model import attention
from vila_ops.model.vila import VilaForConditionalGeneration
from vila_ops.train.objective import copied

SEGMENTS = torch.tensor([[1] * 50 + [2] * 70 + [3] * 60 + [0] * 20, [1] * 140 + [2] * 60])
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def positions(segments: Tensor) -> Tensor:
    """Position ids, from 0 in each segment."""
    return torch.stack([torch.cat([torch.arange(int(n)) for n in row.unique_consecutive(return_counts=True)[1]])
                        for row in segments])  # fmt: skip


def hidden_of(whole: VilaForConditionalGeneration, kernel: Any, segments: Tensor = SEGMENTS) -> Tensor:
    """Last hidden states of fixed random tokens with a kernel."""
    attention.use(whole, kernel)
    device = whole.lm_head.weight.device
    ids = torch.randint(4, 500, SEGMENTS.shape, generator=torch.Generator().manual_seed(0)).to(device)
    planned = copied(attention.plan(whole, segments), lambda tensor: tensor.to(device))
    masks = attention.document_mask(whole, segments.to(device), planned)
    place = positions(SEGMENTS).to(device)
    states: Tensor = whole.hidden(whole.embed(ids, None), position_ids=place, use_cache=False, **masks)[0]
    return states


def test_a_mask_of_five_tokens() -> None:
    actual = attention.attention_mask(torch.tensor([[1, 1, 2, 2, 0]]))
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
    assert actual.shape == (1, 1, 5, 5)
    assert actual[0, 0].int().tolist() == expected


def test_lengths_for_flash_attention_are_those_that_transformers_reads_from_positions() -> None:
    (bounds, _), (longest, _) = prepare_fa_kwargs_from_position_ids(positions(SEGMENTS))
    actual = attention._bounds(SEGMENTS)
    assert actual.starts.tolist() == bounds.tolist() == [0, 50, 120, 180, 200, 340, 400]
    assert actual.starts.dtype == torch.int32
    assert actual.longest == int(longest) == 140


def segments_of(lengths: list[int], tokens: int) -> Tensor:
    """(1, tokens), with padding after segments of these lengths."""
    numbers = torch.arange(1, len(lengths) + 1).repeat_interleave(torch.tensor(lengths))
    return torch.nn.functional.pad(numbers, (0, tokens - len(numbers)))[None]


@pytest.mark.parametrize("window", [None, 1, 20, 129, 200, 300])
@pytest.mark.parametrize(
    "segments",
    [
        SEGMENTS,
        segments_of([1000], 1000),
        segments_of([1024], 1024),
        segments_of([128, 256, 512], 1024),
        segments_of([127, 2, 300, 1, 128, 10], 700),
    ],
    ids=["two_rows", "one", "whole", "edges", "many"],
)
def test_blocks_for_flex_attention_are_those_that_torch_finds_in_the_mask(window: int | None, segments: Tensor) -> None:
    def attends(row: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (query >= key) & (segments[row, query] == segments[row, key])
        return seen if window is None else seen & (query - key < window)

    rows, tokens = segments.shape
    expected = create_block_mask(attends, rows, None, tokens, tokens, device="cpu")
    blocks = attention._blocks(segments, window)
    actual = attention._block_mask(segments, window, blocks)
    for name, tensor in vars(blocks).items():
        assert torch.equal(tensor, getattr(expected, name)), name
        assert tensor.dtype == getattr(expected, name).dtype == torch.int32
        assert tensor.is_contiguous()
    assert torch.equal(actual.to_dense(), expected.to_dense())
    assert (actual.shape, actual.seq_lengths) == (expected.shape, expected.seq_lengths)


def test_varlen_attention_gives_what_sdpa_gives(make_model: Any, build: Callable[..., Any]) -> None:
    """States and gradients, of two rows whose segments differ."""
    whole, _ = build(make_model())
    layer = whole.model.language_model.layers[0].self_attn.q_proj.weight
    (varlen, its_gradient), (sdpa, expected) = (
        (states, torch.autograd.grad(states.square().sum(), layer)[0])
        for states in (hidden_of(whole.train(), kernel) for kernel in ("varlen", "sdpa"))
    )
    assert (varlen - sdpa).abs().max() <= 1e-5
    assert (its_gradient - expected).norm() <= 1e-4 * expected.norm()


def test_with_compiled_layers_the_kernel_has_one_shape_for_all_rows() -> None:
    assert attention.choose("auto", CPU, "fp32", compiled=True) == "sdpa"
    with pytest.raises(ValueError, match="which with compile: true is slower"):
        attention.choose("varlen", CPU, "fp32", compiled=True)


@pytest.mark.slow
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="the kernel that torch 2.13 writes for flex attention does not compile without AVX2",
)
def test_flex_attention_gives_what_sdpa_gives(make_model: Any, build: Callable[..., Any]) -> None:
    """Without gradients, which FlexAttention lacks on a CPU; with one segment for all, states differ."""
    whole, _ = build(make_model())
    with torch.no_grad():
        flex, sdpa = (hidden_of(whole.train(), kernel) for kernel in ("flex", "sdpa"))
        leaking = hidden_of(whole, "sdpa", torch.ones_like(SEGMENTS))
    assert (flex - sdpa).abs().max() <= 1e-5
    assert (leaking - flex).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("requested", "device", "installed", "precision", "chosen"),
    [
        ("auto", CPU, True, "bf16", "varlen"),
        ("auto", torch.device("mps"), False, "fp32", "sdpa"),
        ("auto", GPU, True, "bf16", "flash"),
        ("auto", GPU, True, "fp32", "flex"),
        ("auto", GPU, False, "bf16", "flex"),
        ("sdpa", GPU, True, "bf16", "sdpa"),
        ("flex", GPU, False, "fp32", "flex"),
        ("flash", GPU, True, "bf16", "flash"),
    ],
)
def test_the_fastest_kernel_that_can_train_here_is_chosen(
    requested: Any, device: torch.device, installed: bool, precision: Any, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "find_spec", lambda name: object() if installed else None)
    assert attention.choose(requested, device, precision) == chosen


@pytest.mark.parametrize(
    ("requested", "device", "installed", "precision", "message"),
    [
        (
            "flash",
            CPU,
            True,
            "bf16",
            "attention flash: FlashAttention runs on a GPU, and this stage computes on cpu",
        ),
        ("flex", CPU, True, "bf16", "attention flex: FlexAttention has no backward pass on a CPU"),
        (
            "varlen",
            GPU,
            True,
            "bf16",
            "attention varlen computes one document after the other, which on cuda",
        ),
        ("flash", GPU, False, "bf16", "attention flash needs the package flash-attn; install it, or use auto"),
        ("flash", GPU, True, "fp32", "attention flash computes in 16 bits, and the stage's precision is fp32; use"),
    ],
)
def test_a_kernel_that_cannot_train_here_is_refused(
    requested: Any, device: torch.device, installed: bool, precision: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "find_spec", lambda name: object() if installed else None)
    with pytest.raises(ValueError, match=re.escape(message)):
        attention.choose(requested, device, precision)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("kernel", "amp"), [("flex", False), ("flex", True), ("flash", True)])
def test_on_a_gpu_every_kernel_gives_states_and_gradients_of_sdpa(
    kernel: str, amp: bool, make_model: Any, build: Callable[..., Any]
) -> None:
    if kernel == "flash" and find_spec("flash_attn") is None:
        pytest.skip("needs the package flash-attn")
    whole, _ = build(make_model())
    whole.to("cuda").train()
    actual = []
    for name in (kernel, "sdpa"):
        whole.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=amp):
            states = hidden_of(whole, name)
            wanted = SEGMENTS.cuda() > 0  # outputs at padding are not compared
            loss = cross_entropy(whole.lm_head(states[wanted]).float(), torch.ones_like(SEGMENTS).cuda()[wanted])
        torch.autograd.backward(loss)
        gradients = [p.grad.clone() for p in whole.model.language_model.layers.parameters()]
        actual.append([states[wanted].detach().float(), *gradients])
    for own, other in zip(*actual, strict=True):
        assert (own - other).norm() <= (2**-6 if amp else 1e-4) * other.norm()
