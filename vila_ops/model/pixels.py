"""Encoded squares to the pixel values that a vision tower takes: decoded on the host, normalised on the tower's device.

A level takes one byte and a pixel value four, so levels are what is copied.
"""

# I images, S side in pixels

import io
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as Pillow
from torch import Tensor

from vila_ops.model.copies import Copies


def levels(square: bytes) -> NDArray[np.uint8]:
    """One encoded square to its levels (S, S, 3) in 0 .. 255."""
    image = Pillow.open(io.BytesIO(square), formats=("WEBP", "JPEG", "PNG"))
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def stacked_levels(squares: Sequence[bytes], copies: Copies) -> Tensor:
    """Encoded squares of one size, at least one, to their levels (I, S, S, 3) in memory that `copies` copies from.

    It is one block, since the thread that frees a large block may have to wait while others get new pages.
    """
    first = levels(squares[0])
    stacked = copies.empty(len(squares), *first.shape, dtype=torch.uint8)
    places = stacked.numpy()
    places[0] = first
    for place, square in zip(places[1:], squares[1:], strict=True):
        place[:] = levels(square)
    return stacked


class Pixels:
    """The pixel values of a tower with this mean and standard deviation of each channel."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        constants = (torch.tensor(255.0), torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1))
        self._constants: tuple[Tensor, ...] = constants

    def __call__(self, squares: Sequence[bytes]) -> Tensor:
        """Encoded squares to pixel values (I, 3, S, S) on the CPU."""
        return self.values(torch.from_numpy(np.stack([levels(square) for square in squares])))

    def values(self, levels: Tensor) -> Tensor:
        """Levels (I, S, S, 3) to pixel values (I, 3, S, S): (x / 255 - mean) / std for each channel, on their device.

        The numbers are tensors of the device, since a GPU multiplies by the inverse of a number of the host: so all
        devices give the same bits.
        """
        self._constants = tuple(one.to(levels.device) for one in self._constants)
        white, mean, std = self._constants
        scaled = levels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return scaled.div_(white).sub_(mean).div_(std)
