"""Peak memory, over its inputs, of the loss of 1024 x 49152 logits: `python loss_memory.py WAY` writes MiB.

Each way has a process of its own, because a process's peak never falls.
"""

import sys
from pathlib import Path

import torch

from vila_ops.model.loss import Head

N, D, V = 1024, 64, 49152


def main() -> None:
    torch.set_num_threads(1)
    head = Head(D, V, bias=False)
    hidden = torch.randn(N, D, requires_grad=True)
    labels = torch.randint(0, V, (N,))

    def full(count: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(head(hidden[:count]), labels[:count], reduction="sum")

    def chunks(count: int) -> torch.Tensor:
        total: torch.Tensor = head(hidden[:count], labels[:count])[0]
        return total

    def in_bf16(count: int) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return chunks(count)

    @torch.no_grad()
    def without_gradients(count: int) -> torch.Tensor:
        return chunks(count)

    ways = {way.__name__: way for way in (full, chunks, in_bf16, without_gradients)}

    def run(count: int) -> None:
        loss = ways[sys.argv[1]](count)
        if loss.requires_grad:
            torch.autograd.backward(loss / count)
        head.weight.grad = hidden.grad = None

    run(1)  # a first call allocates memory that is not the loss's
    before = memory("VmRSS")
    run(N)
    sys.stdout.write(str(memory("VmHWM") - before))


def memory(field: str) -> float:
    """Peak memory of this process in MiB; getrusage's peak includes that of the parent process."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 2**10


if __name__ == "__main__":
    main()
