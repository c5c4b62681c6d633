"""The key-value cache of the rows that are read and decoded, each with its own length; its size has a bound."""

# N slots, R rows of a group, Q new tokens of a row, T those of a pass, W key positions, H key-value heads, K head dim

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaModel

from vila_ops.generate.torch_engine.row_attention import RowStates

CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
"""The argument by which models of transformers take a cache; it is `cache` from 5.24 on."""
PAGE = 64
"""The capacity of a row is a multiple of it, so that requests of similar length need no other capacity."""
MIN_SLOTS = 8
"""There is memory for so many rows from the first request on, since more memory for a second one delays a token."""
MIN_TOKENS = 4096
"""Positions that these slots have at most; of longer rows there are fewer slots at first."""


Group = tuple[Sequence[int], Sequence[int]]
"""Rows of a pass, and how many tokens it adds to each."""


@dataclass(frozen=True)
class _Padded:
    """The rows of a group with the same number of new tokens, padding included."""

    rows: Tensor
    """(R,)"""
    positions: Tensor
    """(R, Q) of the new tokens."""
    ends: Tensor
    """(R, Q): where their keys and values are written."""
    width: int
    """W: key positions that the pass reads."""
    is_front: bool
    """Whether the rows are the first of the cache."""


class KVCache:
    """Keys and values of sequences, passed to the model as CACHE_ARGUMENT.

    A pass (`begin`, the model, `end`) adds tokens to some rows, to each its own number. The new tokens of all rows are
    one row of the pass, group by group. The caller passes masks and positions explicitly, so the model's layers use
    only `update`, whose result `row_attention` takes. Layers with a sliding window keep all positions too; their mask
    hides those outside of it.
    """

    def __init__(self, *, max_tokens: int, device: torch.device) -> None:
        """`max_tokens` bounds slots x capacity: the positions in memory, used or not."""
        self.max_tokens, self.device = max_tokens, device
        self.clear()

    def clear(self) -> None:
        """Forget all rows and release their memory."""
        self.slots = self.capacity = 0
        self.lengths: list[int] = []
        """Tokens of each row."""
        self.keys: list[Tensor] = []
        """One tensor (N, H, capacity + 1, K) a layer, made by its first pass. Padding is written to the last position,
        which no pass reads."""
        self.values: list[Tensor] = []

    def fits(self, needs: Sequence[int]) -> bool:
        """Whether rows of at most so many tokens each can be in memory at the same time."""
        return len(needs) * self._capacity(needs) <= self.max_tokens

    def reserve(self, needs: Sequence[int]) -> None:
        """Have memory for the rows that are there and for new ones behind them: `needs` has the most tokens of each."""
        new = [0] * (len(needs) - len(self.lengths))
        if len(needs) > self.slots or max(needs) > self.capacity:
            slots = 1 << (len(needs) - 1).bit_length()
            is_kept = slots * self.capacity <= self.max_tokens
            self.capacity = max(self._capacity(needs), self.capacity if is_kept else 0)
            slots = max(slots, min(MIN_SLOTS, MIN_TOKENS // self.capacity))
            self.slots = min(slots, self.max_tokens // self.capacity)
            self.keys, self.values = ([self._moved(layer) for layer in layers] for layers in (self.keys, self.values))
        self.lengths += new

    def begin(self, groups: Sequence[Group]) -> Tensor:
        """Begin a pass for groups of rows, and return the positions (1, T) of all tokens.

        A row with fewer tokens than others of its group is padded on the right, at the position of its last token.
        """
        self._added = [(row, count) for rows, counts in groups for row, count in zip(rows, counts, strict=True)]
        self._groups = [self._group(rows, counts) for rows, counts in groups]
        return torch.cat([group.positions.flatten() for group in self._groups])[None]

    def distances(self) -> list[Tensor]:
        """(R, Q, W) of each group: the position of each new token minus those of the keys; negative: not seen yet."""
        return [group.positions[:, :, None] - torch.arange(group.width, device=self.device) for group in self._groups]

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[RowStates, RowStates]:
        """Take a layer's keys and values (1, H, T, K) of the pass and return those of all tokens so far."""
        if layer_idx == len(self.keys):
            self.keys.append(self._empty(key))
            self.values.append(self._empty(value))
        return self._write(self.keys[layer_idx], key), self._write(self.values[layer_idx], value)

    def get_seq_length(self, *_: object) -> int:
        """Tokens of the longest row. transformers calls it, but uses the positions that it is passed."""
        return max(self.lengths, default=0)

    def end(self) -> None:
        """Count the tokens of the pass."""
        for row, count in self._added:
            self.lengths[row] += count

    def swap(self, one: int, other: int) -> None:
        """Exchange two rows."""
        if one == other:
            return
        used = max(self.lengths[one], self.lengths[other])
        for layer in (*self.keys, *self.values):
            kept = layer[one, :, :used].clone()
            layer[one, :, :used] = layer[other, :, :used]
            layer[other, :, :used] = kept
        self.lengths[one], self.lengths[other] = self.lengths[other], self.lengths[one]

    def pop(self) -> None:
        """Drop the last row."""
        self.lengths.pop()

    def copy(self, row: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (H, T, K) of a row's tokens, of each layer."""
        used = self.lengths[row]
        return [
            (key[row, :, :used].clone(), value[row, :, :used].clone())
            for key, value in zip(self.keys, self.values, strict=True)
        ]

    def fill(self, row: int, layers: Sequence[tuple[Tensor, Tensor]], count: int) -> None:
        """Give a row without tokens the first `count` tokens of a copy."""
        if not self.keys:
            self.keys, self.values = ([self._empty(one[number][None]) for one in layers] for number in (0, 1))
        for key, value, (copied_key, copied_value) in zip(self.keys, self.values, layers, strict=True):
            key[row, :, :count] = copied_key[:, :count]
            value[row, :, :count] = copied_value[:, :count]
        self.lengths[row] = count

    def _capacity(self, needs: Sequence[int]) -> int:
        return min(-(-max(needs) // PAGE) * PAGE, self.max_tokens)

    def _empty(self, filled: Tensor) -> Tensor:
        """Zeros, because a masked position that is not finite would still spoil a sum."""
        _, heads, _, size = filled.shape
        return filled.new_zeros(self.slots, heads, self.capacity + 1, size)

    def _moved(self, layer: Tensor) -> Tensor:
        moved, rows, used = self._empty(layer), len(self.lengths), self.get_seq_length()
        moved[:rows, :, :used] = layer[:rows, :, :used]
        return moved

    def _group(self, rows: Sequence[int], counts: Sequence[int]) -> _Padded:
        lengths = torch.tensor([[self.lengths[row]] for row in rows])
        new = torch.arange(max(counts))[None]
        added = torch.tensor(counts)[:, None]
        positions = lengths + torch.minimum(new, added - 1)
        return _Padded(
            rows=torch.tensor(rows, device=self.device),
            positions=positions.to(self.device),
            ends=torch.where(new < added, positions, self.capacity).to(self.device),
            width=int(positions.max()) + 1,
            is_front=list(rows) == list(range(len(rows))),
        )

    def _write(self, layer: Tensor, new: Tensor) -> RowStates:
        parts = torch.split(new[0], [group.positions.numel() for group in self._groups], dim=1)
        states = []
        for group, part in zip(self._groups, parts, strict=True):
            layer[group.rows[:, None], :, group.ends] = torch.unflatten(part.transpose(0, 1), 0, group.ends.shape)
            rows = slice(len(group.rows)) if group.is_front else group.rows
            states.append(layer[rows, :, : group.width])
        return RowStates(states, [group.positions.shape[1] for group in self._groups])
