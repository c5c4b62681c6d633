"""The language model's head with a chunked cross-entropy loss: the logits of a long row are never in memory at once.

The loss ends the network, so its gradients are computed in the forward pass, beside one chunk's logits at a time, and
the backward pass only scales them (as Liger Kernel does, arXiv:2410.10989).
"""

# N tokens, D language model dim, V vocabulary, C tokens of a chunk

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vila_ops.device import has_gpu_kernels
from vila_ops.model.language_models import PLAIN_HEAD, HeadForm

MIN_CHUNK = 64
"""Tokens of a chunk; matrix products with fewer rows are slow."""


def chunk_tokens(width: int) -> int:
    """C: a quarter of D, at least MIN_CHUNK.

    A chunk's logits are then small beside the weight's gradient, and its matrix products large enough to be fast.
    """
    return max(MIN_CHUNK, width // 4)


SLICE = 4096
"""Rows of the weight's gradient that are added at once."""


class Head(nn.Linear):
    """Hidden states -> logits, or -> losses if labels are given.

    Losses are computed in its forward pass, because ZeRO-3 gathers the whole weight only there.
    """

    form: HeadForm = PLAIN_HEAD

    def set_form(self, form: HeadForm) -> None:
        """Set what is computed besides the product with the weight; a bias that is missing becomes zeros."""
        self.form = form
        if form.bias and "bias" not in dict(self.named_parameters()):
            self.bias = nn.Parameter(self.weight.new_zeros(self.out_features))

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Any:
        """Logits (..., V) of hidden states (..., D); with labels (N,), the losses of hidden states (N, D).

        Losses are their sum, on which backward may be called once, and the negative log-likelihoods (N,) without
        gradients; both in nats and fp32. Under no_grad no gradient is computed.
        """
        softcap = self.form.softcap
        if self.form.scale != 1:
            hidden = hidden * self.form.scale
        if labels is None:
            logits = super().forward(hidden)
            return logits if softcap is None else softcap * torch.tanh(logits / softcap)
        settings = (softcap, torch.is_grad_enabled())
        return _Losses.apply(hidden, self.weight, self.bias, labels, settings)  # type: ignore[no-untyped-call]


class _Losses(torch.autograd.Function):
    """Sum and losses of a head's labels, computed in autocast's dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        settings: tuple[float | None, bool],
    ) -> tuple[Tensor, Tensor]:
        softcap, differentiable = settings
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        needs = [differentiable and needed for needed in ctx.needs_input_grad[:3]]
        compute = _by_liger if has_gpu_kernels(hidden.device) and find_spec("liger_kernel") else _by_chunks
        with torch.no_grad(), torch.autocast(kind, enabled=False):
            losses, gradients = compute(
                hidden.detach().to(dtype).requires_grad_(needs[0]),
                weight.detach().to(dtype).requires_grad_(needs[1]),
                None if bias is None else bias.detach().to(dtype).requires_grad_(needs[2]),
                labels,
                softcap,
            )
        ctx.gradients = [
            gradient.to(tensor.dtype) if need and tensor is not None and gradient is not None else None
            for need, tensor, gradient in zip(needs, (hidden, weight, bias), gradients, strict=True)
        ]
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # In place and released: a copy of the weight's gradient would be the largest tensor in memory.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("backward was called twice on one loss, whose gradients are released by the first call")
        return *(None if gradient is None else gradient.mul_(upstream) for gradient in gradients), None, None


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Gradients of hidden states, weight and bias."""


def _by_chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, softcap: float | None
) -> tuple[Tensor, Gradients]:
    """Losses (N,) and the gradients of their sum for the inputs that require one."""
    of_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
    of_weight = torch.zeros_like(weight, dtype=torch.float32) if weight.requires_grad else None
    of_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and bias.requires_grad else None
    losses = hidden.new_empty(len(hidden), dtype=torch.float32)
    size = chunk_tokens(hidden.shape[1])
    products = hidden.new_empty(min(size, len(hidden)), len(weight))  # shared by all chunks: allocating is slow
    whole = products if products.dtype == torch.float32 else products.float()
    for start in range(0, len(hidden), size):
        own, wanted = hidden[start : start + size], labels[start : start + size, None]
        product_CV, logits_CV = products[: len(own)], whole[: len(own)]
        if bias is None:
            torch.mm(own, weight.T, out=product_CV)
        else:
            torch.addmm(bias, own, weight.T, out=product_CV)
        if whole is not products:
            logits_CV.copy_(product_CV)
        losses[start : start + size] = _losses_in_place(logits_CV, wanted, softcap)
        if of_bias is not None:
            of_bias += logits_CV.sum(0)
        if whole is not products:
            product_CV.copy_(logits_CV)
        if of_hidden is not None:
            torch.mm(product_CV, weight, out=of_hidden[start : start + size])
        if of_weight is not None:
            _add_product(of_weight, product_CV.T, own)
    return losses, (of_hidden, of_weight, of_bias)


def _add_product(total_VD: Tensor, left_VC: Tensor, right_CD: Tensor) -> None:
    """Add a product to a sum in place; a 16-bit product is added to an fp32 sum in slices, to save memory."""
    if total_VD.dtype == left_VC.dtype:
        total_VD.addmm_(left_VC, right_CD)
        return
    for total, left in zip(torch.split(total_VD, SLICE), torch.split(left_VC, SLICE), strict=True):
        total += left @ right_CD


def _losses_in_place(logits_CV: Tensor, labels_C1: Tensor, softcap: float | None) -> Tensor:
    """Losses (C,); in place, the logits become the gradients of their sum: softmax minus 1 at the label.

    With a soft cap, this is times its slope, 1 - tanh(logits / c)^2.
    """
    slope_CV = None
    if softcap is not None:
        logits_CV.div_(softcap).tanh_()
        slope_CV = 1 - logits_CV**2
        logits_CV *= softcap
    logits_CV -= logits_CV.amax(1, keepdim=True)
    of_label = logits_CV.gather(1, labels_C1)
    total = logits_CV.exp_().sum(1, keepdim=True)
    logits_CV /= total
    logits_CV.scatter_add_(1, labels_C1, torch.full_like(of_label, -1.0))
    if slope_CV is not None:
        logits_CV *= slope_CV
    return (total.log() - of_label)[:, 0]


def _by_liger(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, softcap: float | None
) -> tuple[Tensor, Gradients]:
    """The same with Liger's kernels, which need Triton and so a GPU."""
    from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward

    results = fused_linear_cross_entropy_forward(
        hidden, weight, labels, bias=bias, reduction="none", softcap=softcap, accum_dtype=torch.float32
    )
    return results[0], results[-3:]  # those between differ from version to version
