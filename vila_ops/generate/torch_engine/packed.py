"""Weights of the language model in the order in which oneDNN multiplies them on a CPU, in fp32.

torch gives fp32 products to MKL, which orders a weight again for each product. Ordered once, and by oneDNN, products
take 0.4 of the time (one thread of an AVX-512 machine, SmolLM2's matrices, 4 to 256 rows). Their rounding differs.
A head whose weight is the embedding's too has a copy of it.

oneDNN compiles a product for each number of rows, and keeps 1,024 of them. Each takes half a millisecond and half a
megabyte (measured, the same machine), so rows are padded to few numbers.
"""

import torch
from torch import Tensor, nn

from vila_ops.generate.torch_engine.replaced import replace_weight
from vila_ops.model.vila import VilaForConditionalGeneration

ROWS = 16
"""The number of rows for which oneDNN is asked to choose the order; others are as fast with it."""


class PackedLinear(nn.Linear):
    """A linear layer whose matrix is `packed`; mixed into the class of the layer that it was."""

    packed: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        rows = x.flatten(0, -2)
        count = len(rows)
        if more := padded(count) - count:
            rows = nn.functional.pad(rows, (0, 0, 0, more))
        out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.packed, self._parameters["bias"], "none", [], "")
        return out[:count].view(*x.shape[:-1], -1)


def padded(rows: int) -> int:
    """The least number that is not below `rows` among those used: all below 16, then eight for each doubling."""
    step = 1 << max(0, rows.bit_length() - 4)
    return -(-rows // step) * step


def can_pack() -> bool:
    """Whether this torch has oneDNN and its operators, which are those of its compiler and not documented."""
    operators = ("_reorder_linear_weight", "_linear_pointwise")
    has_library: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return has_library and all(hasattr(torch.ops.mkldnn, name) for name in operators)


def pack(model: VilaForConditionalGeneration) -> None:
    """Pack the language model's matrices in place."""
    for layer in [model.lm_head, *model.model.language_model.modules()]:
        if isinstance(layer, nn.Linear):
            packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), ROWS)
            layer.register_buffer("packed", packed, persistent=False)
            replace_weight(layer, nn.Linear, PackedLinear)
