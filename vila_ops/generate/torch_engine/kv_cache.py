"""The key-value cache of the rows that are read and decoded, each with its own length; its size has a bound."""

# N slots, R rows of a pass, Q new tokens of a row, H key-value heads, K head dim

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LlamaModel

CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
"""The argument by which models of transformers take a cache; it is `cache` from 5.24 on."""
PAGE = 64
"""The capacity of a row is a multiple of it, so that requests of similar length need no other capacity."""
MIN_SLOTS = 8
"""There is memory for so many rows from the first request on, since more memory for a second one delays a token."""
MIN_TOKENS = 4096
"""Positions that these slots have at most; of longer rows there are fewer slots at first."""


class KVCache:
    """Keys and values of sequences, passed to the model as CACHE_ARGUMENT.

    A pass (`begin`, the model, `end`) adds tokens to some rows, to each its own number. The caller passes masks and
    positions explicitly, so the model's layers use only `update`. Layers with a sliding window keep all positions too;
    their mask hides those outside of it.
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

    def begin(self, rows: Sequence[int], counts: Sequence[int]) -> Tensor:
        """Begin a pass that adds `counts` tokens to `rows`, and return the positions (R, Q) of all its tokens.

        A row with fewer tokens than others is padded on the right, at the position of its last token.
        """
        self._pass = (rows, counts)
        lengths = torch.tensor([[self.lengths[row]] for row in rows])
        new = torch.arange(max(counts))[None]
        added = torch.tensor(counts)[:, None]
        positions = lengths + torch.minimum(new, added - 1)
        self._ends = torch.where(new < added, positions, self.capacity).to(self.device)
        self._rows = torch.tensor(rows, device=self.device)
        self._width = int(positions.max()) + 1
        self._is_front = list(rows) == list(range(len(rows)))
        self._positions = positions.to(self.device)
        return self._positions

    def distance(self) -> Tensor:
        """(R, 1, Q, width): the position of each token of the pass minus those of the keys; negative: not seen yet."""
        keys = torch.arange(self._width, device=self.device)
        return (self._positions[:, :, None] - keys)[:, None]

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Take a layer's keys and values (R, H, Q, K) of the pass and return those of all tokens so far."""
        if layer_idx == len(self.keys):
            self.keys.append(self._empty(key))
            self.values.append(self._empty(value))
        return self._write(self.keys[layer_idx], key), self._write(self.values[layer_idx], value)

    def get_seq_length(self, *_: object) -> int:
        """Tokens of the longest row. transformers calls it, but uses the positions that it is passed."""
        return max(self.lengths, default=0)

    def end(self) -> None:
        """Count the tokens of the pass."""
        for row, count in zip(*self._pass, strict=True):
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

    def _write(self, layer: Tensor, new: Tensor) -> Tensor:
        layer[self._rows[:, None], :, self._ends] = new.transpose(1, 2)
        if self._is_front:
            return layer[: len(self._rows), :, : self._width]
        return layer[self._rows, :, : self._width]
