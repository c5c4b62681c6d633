"""Kernels against each other in steps of the model of gpu_model.py, and in its head's loss.

attention   a step with each kernel that trains on this device (sdpa, flex, flash)
layers      a step with compiled layers, against the same kernel without
head        loss and gradients of a micro-batch's targets, by Liger's kernels and by chunks

`ours` is a step with what `auto` chooses, `peer` with SDPA and its explicit mask. Target: at most its time. Needs a
GPU. VILA_BENCH_SMALL=1 runs it in small on the CPU, which has SDPA and chunks alone.
"""

import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from gpu_model import PASSES, ROWS, SMALL, device, packed, random_model, trainee
from result import result

from vila_ops.device import describe, has_gpu_kernels
from vila_ops.model import attention, loss

WARM_UP, STEPS = (1, 1) if SMALL else (3, 5)


def main() -> None:
    on = device()
    chosen = attention.choose("auto", on, "bf16")
    steps = {kernel: seconds(attention=kernel) for kernel in ("sdpa", "flex", "flash") if trains(kernel, on)}
    result(
        "gpu_kernels",
        ours=steps[chosen],
        peer=steps["sdpa"],
        target=1.0,
        ok=steps[chosen] <= steps["sdpa"],
        unit="seconds of a step",
        auto=chosen,
        attention=steps,
        compiled_layers={chosen: seconds(attention=chosen, compile=True)},
        head=heads(on),
        device=describe(on),
    )


def trains(kernel: Any, on: torch.device) -> bool:
    """Whether a kernel is installed and trains on a device."""
    try:
        attention.choose(kernel, on, "bf16")
    except ValueError:
        return False
    return True


def seconds(**train: Any) -> float:
    """Median seconds of a step with settings of `resources.train`."""
    gc.collect()
    ours = trainee({"trainable": ["projector", "language_model"]}, **train)
    rows = packed(ROWS * PASSES)
    batches = [ours.batch(rows[start : start + ROWS]) for start in range(0, len(rows), ROWS)]
    return round(statistics.median([ours.step(batches) for _ in range(WARM_UP + STEPS)][WARM_UP:]), 4)


def heads(on: torch.device) -> dict[str, float]:
    """Median seconds of loss and gradients by each way that this device has."""
    head = random_model(on).lm_head.to(torch.bfloat16)
    count = 512 if SMALL else 4096
    hidden = torch.randn(count, head.in_features, device=on, dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(0, head.out_features, (count,), device=on)
    ways: dict[str, Callable[..., Any]] = {"chunks": loss._by_chunks}
    if has_gpu_kernels(on) and find_spec("liger_kernel"):
        ways["liger"] = loss._by_liger
    return {name: _timed(partial(way, hidden, head.weight, None, labels, None)) for name, way in ways.items()}


def _timed(run: Callable[[], Any]) -> float:
    times = []
    for _ in range(WARM_UP + STEPS):
        started = time.perf_counter()
        with torch.no_grad():
            losses, _ = run()
        float(losses.sum())  # waits for the device
        times.append(time.perf_counter() - started)
    return round(statistics.median(times[WARM_UP:]), 5)


if __name__ == "__main__":
    main()
