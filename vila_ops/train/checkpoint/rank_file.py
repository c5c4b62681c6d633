"""One rank's part of a checkpoint: staging buffers in host memory, and the bytes of a safetensors file."""

import hashlib
import json
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from vila_ops.artifacts.backend import FileFacts
from vila_ops.device import on_accelerator

CHUNK_BYTES = 2**20
"""Small enough to stay in the processor's cache between hashing and writing."""


class RankFile:
    """The chunks of a safetensors file of fp32 tensors on the CPU. They are read once, and hashed meanwhile."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        header, end = {}, 0
        for name, tensor in tensors.items():
            header[name] = {
                "dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes],
            }  # fmt: skip
            end += tensor.nbytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # aligns the tensors
        self.header = len(text).to_bytes(8, "little") + text
        self.size = len(self.header) + end
        self.bytes_read = 0
        """Bytes that were read so far."""
        self._hash = hashlib.sha256()

    def __iter__(self) -> Iterator[memoryview]:
        for part in self._parts():
            for start in range(0, len(part), CHUNK_BYTES):
                chunk = part[start : start + CHUNK_BYTES]
                self._hash.update(chunk)
                yield chunk
                self.bytes_read += len(chunk)

    def facts(self) -> FileFacts:
        """Return size and sha256 of the file, after all of it was read."""
        assert self.bytes_read == self.size, f"{self.bytes_read} of {self.size} bytes were read"
        return FileFacts(size=self.size, sha256=self._hash.hexdigest())

    def _parts(self) -> Iterator[memoryview]:
        yield memoryview(self.header)
        for tensor in self.tensors.values():
            assert tensor.dtype is torch.float32
            yield memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


class StagingBuffers:
    """Copies of tensors in host memory. Buffers are reused by name, and pinned if an accelerator fills them."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, name: str, tensor: Tensor, *, wait: bool = True) -> Tensor:
        """Copy a tensor into the buffer of this name. Without `wait`, the current stream makes the copy later."""
        if name not in self._buffers:
            pinned = on_accelerator(tensor)
            self._buffers[name] = torch.empty(tensor.shape, dtype=torch.float32, pin_memory=pinned)
        buffer = self._buffers[name]
        if on_accelerator(tensor):
            return buffer.copy_(tensor, non_blocking=not wait)
        np.copyto(buffer.numpy(), tensor.numpy())  # torch would start a second thread pool beside the loop's
        return buffer

    def copy_all(self, tensors: Mapping[str, Tensor], *, since: torch.Event | None) -> dict[str, Tensor]:
        """Copy all tensors. From an accelerator, a separate stream copies them after the event `since`."""
        if since is None:
            return {name: self.copy(name, tensor) for name, tensor in tensors.items()}
        device = next(tensor.device for tensor in tensors.values())
        stream = torch.Stream(device)
        stream.wait_event(since)
        with stream:
            copies = {name: self.copy(name, tensor, wait=False) for name, tensor in tensors.items()}
        stream.synchronize()
        return copies
