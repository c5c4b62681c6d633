"""Weight-only quantisation of the language model: integers in memory, fp32 in the products.

int8 has one scale for each row of a matrix; int4 one for each GROUP inputs of a row, but for embedding and head, which
stay int8. Numbers are round(weight / scale), scales the largest magnitude over 127 or 7 (symmetric, no zero point).
Norms, biases, projector and vision tower are not quantised.
"""

# N rows (outputs or tokens), K inputs, T positions, G groups of a row

from math import gcd
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from vila_ops.generate.torch_engine.replaced import replace_weight
from vila_ops.model.vila import VilaForConditionalGeneration

GROUP = 64
"""Inputs that share a scale in int4; fewer where the number of inputs is no multiple of it."""
MIN_GROUP = 16
BLOCK = 2**20
"""Numbers that are made fp32 at once, so that they are multiplied while they are in the processor's cache. A whole head
in fp32 takes 81 ms a token instead of 7 (one thread of an AVX2 machine, 49152 x 576)."""


class Scratch:
    """Memory for a block in fp32, shared by all layers of a model, which run one after another."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._views: dict[tuple[int, int], Tensor] = {}

    def matrix(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """An uninitialised matrix, valid until the next call. Views are kept: a token needs hundreds of them."""
        view = self._views.get((rows, columns))
        if view is not None and view.device == device:
            return view
        if self._memory is None or self._memory.device != device or len(self._memory) < rows * columns:
            self._memory = torch.empty(max(rows * columns, BLOCK), device=device)
            self._views.clear()
        view = self._views[rows, columns] = self._memory[: rows * columns].view(rows, columns)
        return view


class QuantisedMatrix(nn.Module):
    """A matrix (N, K) of integers with scales."""

    numbers: Tensor
    scales: Tensor

    def __init__(self, numbers: Tensor, scales: Tensor, *, columns: int, scratch: Scratch) -> None:
        super().__init__()
        self.register_buffer("numbers", numbers)
        self.register_buffer("scales", scales)
        self.columns, self.scratch = columns, scratch

    def block(self, numbers: Tensor, scales: Tensor) -> Tensor:
        """Some rows in fp32, valid until the next call of any matrix."""
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), a block of rows at a time."""
        numbers, scales = self.numbers, self.scales
        step = max(1, BLOCK // self.columns)
        if len(numbers) <= step:
            return linear(x, self.block(numbers, scales))
        out = x.new_empty(*x.shape[:-1], len(numbers))
        for start in range(0, len(numbers), step):
            some = slice(start, start + step)
            out[..., some] = linear(x, self.block(numbers[some], scales[some]))
        return out


class Int8(QuantisedMatrix):
    """One byte a number, and a scale for each row."""

    def __init__(self, weight: Tensor, scratch: Scratch) -> None:
        scales = _scales(weight, 127)
        numbers = (weight / scales).round_().to(torch.int8)
        super().__init__(numbers, scales[:, 0], columns=weight.shape[1], scratch=scratch)

    def block(self, numbers: Tensor, scales: Tensor) -> Tensor:
        """As in `QuantisedMatrix`, without the scales: they are the product's."""
        return self.scratch.matrix(len(numbers), self.columns, numbers.device).copy_(numbers)

    def product(self, x: Tensor) -> Tensor:
        """As in `QuantisedMatrix`."""
        return super().product(x).mul_(self.scales)

    def looked_up(self, ids: Tensor) -> Tensor:
        """Rows (..., K) of ids (...)."""
        return self.numbers[ids] * self.scales[ids][..., None]


class Int4(QuantisedMatrix):
    """Two numbers a byte, K / 2 apart, and a scale for each group of a row."""

    def __init__(self, weight: Tensor, scratch: Scratch) -> None:
        rows, columns = weight.shape
        group = gcd(columns, GROUP)
        if group < MIN_GROUP:
            raise ValueError(
                f"int4 needs layers whose inputs are a multiple of {MIN_GROUP}, and one has {columns}; use int8"
            )
        grouped = weight.view(rows, -1, group)
        scales = _scales(grouped, 7)
        low, high = (grouped / scales).round_().to(torch.int8).view(rows, columns).chunk(2, 1)
        # Numbers are read times 16, which keeps their sign.
        super().__init__((low & 0x0F) | (high << 4), scales / 16, columns=columns, scratch=scratch)

    def block(self, numbers: Tensor, scales: Tensor) -> Tensor:
        """As in `QuantisedMatrix`."""
        block = self.scratch.matrix(len(numbers), self.columns, numbers.device)
        low, high = block.chunk(2, 1)
        low.copy_(numbers << 4)
        high.copy_(numbers & -16)
        block.view(len(block), scales.shape[1], -1).mul_(scales)
        return block


def _scales(weight: Tensor, largest: int) -> Tensor:
    """Magnitude of the largest number of the last dimension over `largest`; not 0, by which nothing can be divided."""
    return weight.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / largest


class QuantisedLinear(nn.Linear):
    """A linear layer whose matrix is `quantised`; mixed into the class of the layer that it was."""

    quantised: QuantisedMatrix

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        out, bias = self.quantised.product(x), self._parameters["bias"]
        return out if bias is None else out.add_(bias)


class QuantisedEmbedding(nn.Embedding):
    """An embedding whose matrix is `quantised`; mixed into the class of the embedding that it was."""

    quantised: Int8

    def forward(self, ids: Tensor) -> Tensor:
        """(...) -> (..., K)."""
        return self.quantised.looked_up(ids)


def quantise(model: VilaForConditionalGeneration, kind: Literal["int8", "int4"]) -> None:
    """Quantise the language model in place. Raises ValueError for a layer that int4 does not fit."""
    head, embedding = model.lm_head, model.get_input_embeddings()
    scratch = Scratch()
    tied = head.weight is embedding.weight
    of_embedding = Int8(embedding.weight.detach(), scratch)
    head.quantised = of_embedding if tied else Int8(head.weight.detach(), scratch)
    embedding.quantised = of_embedding
    replace_weight(head, nn.Linear, QuantisedLinear)
    replace_weight(embedding, nn.Embedding, QuantisedEmbedding)
    matrix = Int8 if kind == "int8" else Int4
    for layer in list(model.model.language_model.modules()):
        if isinstance(layer, nn.Linear):
            layer.quantised = matrix(layer.weight.detach(), scratch)
            replace_weight(layer, nn.Linear, QuantisedLinear)
