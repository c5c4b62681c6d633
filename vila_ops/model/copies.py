"""Copies between the host and a device, beside the computation where the device can do both."""

from collections.abc import Callable

import torch
from torch import Tensor

from vila_ops.device import has_streams


class Copies:
    """Copies on streams of their own, from and to pinned memory. Where there are no streams, a copy is a plain one.

    No memory is overwritten while a copy or a computation still reads it: torch's allocator of pinned memory waits for
    the copies from a block before it gives the block away again, and its allocator of the device's memory for the
    streams that `arrived` and `to_host` name.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._inward, self._outward = (torch.Stream(device) if has_streams(device) else None for _ in range(2))

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Memory of the host that `to_device` copies from; pinned if that helps."""
        return torch.empty(shape, dtype=dtype, pin_memory=self._inward is not None)

    def pinned(self, tensor: Tensor) -> Tensor:
        """A tensor of the host in memory that `to_device` copies from."""
        return tensor if self._inward is None else tensor.pin_memory()

    def to_device(self, tensor: Tensor) -> Tensor:
        """Begin to copy a tensor of the host. The computation may read it after `arrived`."""
        if self._inward is None:
            return tensor.to(self.device)
        with self._inward:
            return tensor.to(self.device, non_blocking=True)

    def arrived(self, tensor: Tensor) -> Tensor:
        """A tensor that `to_device` returned; what is computed from now on waits for it, and the host does not."""
        if self._inward is not None:
            computing = torch.accelerator.current_stream(self.device)
            computing.wait_stream(self._inward)
            tensor.record_stream(computing)
        return tensor

    def to_host(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Begin to copy a tensor of the device. The result waits for the copy, in any thread, and returns it."""
        if self._outward is None:
            copy = tensor.to("cpu")
            return lambda: copy
        self._outward.wait_stream(torch.accelerator.current_stream(self.device))
        with self._outward:
            copy = self.empty(*tensor.shape, dtype=tensor.dtype).copy_(tensor, non_blocking=True)
            tensor.record_stream(self._outward)
            done = self._outward.record_event()

        def wait() -> Tensor:
            done.synchronize()
            return copy

        return wait
