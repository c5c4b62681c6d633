from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.forks import output_of
from vila_ops.model.language_models import HeadForm
from vila_ops.model.loss import Head
from vila_ops.model.vila import losses

N, D, V = 700, 96, 5000
"""Eleven chunks, the last of them shorter, and two slices of the weight."""


def make_head(*, bias: bool = True) -> tuple[Head, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    head = Head(D, V, bias=bias)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=draw)
    hidden = torch.randn(N, D, generator=draw, requires_grad=True)
    return head, hidden, torch.randint(0, V, (N,), generator=draw)


def stock(head: Head, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    each = cross_entropy(head(hidden).float(), labels, reduction="none")
    return each.sum(), each.detach()


def distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("bias", [True, False])
def test_loss_and_gradients_are_those_of_full_logits(bias: bool) -> None:
    head, hidden, labels = make_head(bias=bias)
    inputs = [hidden, *head.parameters()]
    expected, of_tokens = stock(head, hidden, labels)
    total, each = head(hidden, labels)
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert not each.requires_grad
    assert torch.allclose(each, of_tokens, rtol=1e-6, atol=1e-6)
    gradients = torch.autograd.grad(total / 7, inputs)
    for actual, wanted in zip(gradients, torch.autograd.grad(expected / 7, inputs), strict=True):
        assert distance(actual, wanted) <= 1e-6


@pytest.mark.parametrize(("scale", "softcap"), [(0.3, None), (1.0, 2.0), (0.5, 3.0)])
def test_scale_and_soft_cap_are_those_of_their_formulas(scale: float, softcap: float | None) -> None:
    """Logits z become scale z, and then c tanh(z / c), as in transformers' Cohere and Gemma 2."""
    head, hidden, labels = make_head()
    head.set_form(HeadForm(bias=True, scale=scale, softcap=softcap))
    inputs = [hidden, *head.parameters()]
    logits = scale * (hidden @ head.weight.T) + head.bias
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = cross_entropy(logits, labels, reduction="sum")
    assert torch.allclose(head(hidden), logits, atol=1e-5)
    total, _ = head(hidden, labels)
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    for actual, wanted in zip(torch.autograd.grad(total, inputs), torch.autograd.grad(expected, inputs), strict=True):
        assert distance(actual, wanted) <= 2e-6


def test_a_head_without_the_bias_of_its_form_gets_zeros() -> None:
    head, _, _ = make_head(bias=False)
    head.set_form(HeadForm(bias=True))
    assert head.bias.shape == (V,)
    assert not head.bias.any()


@pytest.mark.slow
def test_in_bf16_gradients_are_no_farther_from_exact_ones_than_those_of_full_logits() -> None:
    """Full logits round the weight's gradient to 16 bits once; chunks are rounded, but summed in 32 bits."""
    head, hidden, labels = make_head()
    inputs = [hidden, *head.parameters()]
    exact, _ = stock(head, hidden, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        full, _ = stock(head, hidden, labels)
        chunked, _ = head(hidden, labels)
    assert float(chunked.detach()) == pytest.approx(float(full.detach()), rel=1e-6)
    wanted, rounded, actual = (torch.autograd.grad(total, inputs) for total in (exact, full, chunked))
    for own, other, right in zip(actual, rounded, wanted, strict=True):
        assert own.dtype == torch.float32
        assert distance(own, right) <= 1.001 * distance(other, right)
        assert distance(own, other) <= 2**-8, "further apart than a rounding to bf16"


@pytest.mark.slow
def test_a_frozen_head_in_bf16_gives_the_gradient_of_hidden_states_alone() -> None:
    """A 16-bit head, as in a stage that does not train the language model."""
    head, hidden, labels = make_head()
    head.to(torch.bfloat16).requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        full, _ = stock(head, hidden, labels)
        actual, _ = head(hidden, labels)
    (wanted,) = torch.autograd.grad(full, hidden)
    torch.autograd.backward(actual)
    assert hidden.grad is not None
    assert distance(hidden.grad, wanted) <= 1e-3
    assert all(parameter.grad is None for parameter in head.parameters())


def test_without_labels_the_loss_is_zero_and_so_are_its_gradients() -> None:
    head, hidden, labels = make_head()
    total, each = head(hidden[:0], labels[:0])
    torch.autograd.backward(total)
    assert (float(total.detach()), len(each)) == (0.0, 0)
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


def test_a_loss_is_differentiated_once() -> None:
    head, hidden, labels = make_head()
    total, _ = head(hidden, labels)
    torch.autograd.backward(total, retain_graph=True)
    with pytest.raises(RuntimeError, match="called twice"):
        torch.autograd.backward(total)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_weight_has_the_gradients_of_both_its_uses(
    tied: bool, make_model: Any, build: Callable[..., Any]
) -> None:
    whole, _ = build(make_model())
    if not tied:
        whole.lm_head.weight = torch.nn.Parameter(whole.lm_head.weight.detach().clone())
    ids = torch.randint(4, 500, (2, 30), generator=torch.Generator().manual_seed(0))
    labels = ids.where(torch.arange(30) % 3 > 0, -100)

    def gradients(how: Callable[..., Tensor]) -> dict[str, Tensor]:
        whole.zero_grad()
        torch.autograd.backward(how(whole.hidden(whole.embed(ids, None), use_cache=False).last_hidden_state))
        return {name: p.grad.clone() for name, p in whole.named_parameters() if p.grad is not None}

    expected = gradients(lambda hidden: cross_entropy(whole.lm_head(hidden).mT, labels, reduction="sum"))
    targets = (labels.flatten() >= 0).nonzero()[:, 0]
    actual = gradients(lambda hidden: losses(whole, hidden, targets, labels.flatten()[targets])[0])
    assert actual.keys() == expected.keys()
    assert ("lm_head.weight" in actual) == (not tied)
    assert all(distance(actual[name], expected[name]) <= 1e-6 for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "least", "most"),
    [("chunks", 20, 60), ("in_bf16", 20, 60), ("without_gradients", 0, 20), ("full", 400, 900)],
)
def test_peak_memory_is_little_more_than_the_gradient_of_the_weight(way: str, least: int, most: int) -> None:
    """The weight's gradient has 12 MiB and is computed only if required; full logits need many times as much."""
    assert least < float(output_of(Path(__file__).parent / "loss_memory.py", way)[-1]) < most


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("liger", [True, False])
def test_on_a_gpu_loss_and_gradients_are_those_of_full_logits(liger: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if liger and find_spec("liger_kernel") is None:
        pytest.skip("needs the package liger-kernel")
    if not liger:
        monkeypatch.setattr("vila_ops.model.loss.find_spec", lambda name: None)
    head, hidden, labels = make_head(bias=False)
    head.to("cuda")
    hidden, labels = hidden.detach().to("cuda").requires_grad_(), labels.to("cuda")
    inputs = [hidden, head.weight]
    for amp, bound in ((False, 1e-5), (True, 2**-7)):
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=amp):
            (expected, of_tokens), (total, each) = stock(head, hidden, labels), head(hidden, labels)
        assert distance(each, of_tokens) <= bound
        gradients = torch.autograd.grad(total / 7, inputs)
        for actual, wanted in zip(gradients, torch.autograd.grad(expected / 7, inputs), strict=True):
            assert distance(actual, wanted) <= bound
