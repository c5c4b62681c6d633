"""One rank's tensors: how they come to this machine's memory, and as the bytes of a safetensors file."""

import hashlib
import json
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from vila_ops.artifacts.backend import FileFacts

CHUNK_BYTES = 2**20
"""Hashed and written while it is in the processor's cache."""


class RankFile:
    """The bytes of a safetensors file of fp32 tensors on the CPU; hashed as they are read, which is once."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        header, end = {}, 0
        for name, tensor in tensors.items():
            header[name] = {
                "dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes],
            }  # fmt: skip
            end += tensor.nbytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # so that the numbers are aligned
        self.header = len(text).to_bytes(8, "little") + text
        self.size = len(self.header) + end
        self.given = 0
        """Bytes that were read so far."""
        self._hash = hashlib.sha256()

    def __iter__(self) -> Iterator[memoryview]:
        for part in self._parts():
            for start in range(0, len(part), CHUNK_BYTES):
                chunk = part[start : start + CHUNK_BYTES]
                self._hash.update(chunk)
                yield chunk
                self.given += len(chunk)

    def facts(self) -> FileFacts:
        """Size and sha256, when all was read."""
        assert self.given == self.size, f"{self.given} of {self.size} bytes were read"
        return FileFacts(size=self.size, sha256=self._hash.hexdigest())

    def _parts(self) -> Iterator[memoryview]:
        yield memoryview(self.header)
        for tensor in self.tensors.values():
            assert tensor.dtype is torch.float32
            yield memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


class StagingBuffers:
    """Tensors in this machine's memory: buffers that are taken again, and pinned where they are filled from a GPU."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, tensor: Tensor, *, wait: bool = True) -> Tensor:
        """The buffer of this name with the tensor's values; without waiting, once the current stream came so far."""
        if name not in self._buffers:
            self._buffers[name] = torch.empty(tensor.shape, dtype=torch.float32, pin_memory=tensor.is_cuda)
        buffer = self._buffers[name]
        if tensor.is_cuda:
            return buffer.copy_(tensor, non_blocking=not wait)
        np.copyto(buffer.numpy(), tensor.numpy())  # torch would start a second team of threads beside the loop's
        return buffer

    def take_all(self, tensors: Mapping[str, Tensor], *, since: torch.cuda.Event | None) -> dict[str, Tensor]:
        """Copies of all; from a GPU on a stream of its own, beside the loop's, and not before `since`."""
        if since is None:
            return {name: self.take(name, tensor) for name, tensor in tensors.items()}
        device = next(tensor.device for tensor in tensors.values())
        beside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        beside.wait_event(since)
        with torch.cuda.stream(beside):
            copies = {name: self.take(name, tensor, wait=False) for name, tensor in tensors.items()}
        beside.synchronize()
        return copies
