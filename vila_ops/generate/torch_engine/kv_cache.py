"""The key-value cache of a batch: the live rows come first, each with its own length."""

# N slots, T positions, H key-value heads, K head dim

import torch
from torch import Tensor


class KVCache:
    """Keys and values of up to N sequences, passed to the model as `past_key_values`.

    Each pass adds one token to every live row. The caller passes masks and positions explicitly, so the model's layers
    use only `update`. Layers with a sliding window keep all positions too; their mask hides those outside of it.
    """

    def __init__(self, *, slots: int, capacity: int, device: torch.device) -> None:
        self.slots, self.capacity = slots, capacity
        self.keys: list[Tensor] = []
        """One tensor (N, H, capacity, K) a layer, made by the first rows."""
        self.values: list[Tensor] = []
        self.lengths = torch.zeros(slots, dtype=torch.long, device=device)
        self.live = 0
        self._rows = torch.arange(slots, device=device)
        self._known = [0] * slots
        """The same lengths on the host, which need not wait for the device to know them."""

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Append one token's keys and values (live, H, 1, K) to each row and return those of all tokens so far."""
        rows, ends = self._rows[: self.live], self.lengths[: self.live]
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys[rows, :, ends] = key[:, :, 0].to(keys.dtype)
        values[rows, :, ends] = value[:, :, 0].to(values.dtype)
        width = self.width()
        return keys[: self.live, :, :width], values[: self.live, :, :width]

    def get_seq_length(self, *_: object) -> int:
        """Tokens of the longest row. transformers calls it, but uses the positions that it is passed."""
        return max(self._known[: self.live], default=0)

    def width(self) -> int:
        """Positions that a pass reads: those of the longest row and its new token."""
        return self.get_seq_length() + 1

    def distance(self) -> Tensor:
        """(live, 1, 1, width): the position of each row's new token minus those of its keys; negative: no key yet."""
        keys = torch.arange(self.width(), device=self.lengths.device)
        return (self.lengths[: self.live, None] - keys)[:, None, None]

    def advance(self) -> None:
        """Count the token that a pass added to every live row."""
        self.lengths[: self.live] += 1
        self._known[: self.live] = [length + 1 for length in self._known[: self.live]]

    def add(self, layers: list[tuple[Tensor, Tensor]], lengths: list[int]) -> None:
        """Add prefilled rows: keys and values of each layer (rows, H, T, K), up to the length of each row."""
        if not self.keys:
            self.keys, self.values = ([self._empty(pair[kind]) for pair in layers] for kind in (0, 1))
        for row, length in enumerate(lengths):
            for index, (key, value) in enumerate(layers):
                self.keys[index][self.live, :, :length] = key[row, :, :length]
                self.values[index][self.live, :, :length] = value[row, :, :length]
            self.lengths[self.live] = self._known[self.live] = length
            self.live += 1

    def drop(self, row: int) -> None:
        """Free a row; the last live row takes its place."""
        self.live -= 1
        for keys, values in zip(self.keys, self.values, strict=True):
            keys[row], values[row] = keys[self.live].clone(), values[self.live].clone()
        self.lengths[row] = self.lengths[self.live]
        self._known[row] = self._known[self.live]

    def _empty(self, filled: Tensor) -> Tensor:
        _, heads, _, size = filled.shape
        return filled.new_zeros(self.slots, heads, self.capacity, size)
