"""MFU of training on one GPU: 1.2 billion weights with a tower of 400 million (gpu_model.py), by the step of a stage.

Tower, projector and language model all train. FLOPs follow the rule of `vila_ops/plan/flops.py`: padding and
recomputation do not count. `ours` is the MFU, `peer` the peak that it is a share of: dense bf16 of an H100 or H200.
Target: 0.45. Needs a GPU; VILA_BENCH_SMALL=1 runs it in small without one.
"""

import statistics

from gpu_model import PASSES, ROWS, SMALL, Row, packed, targets, trainee
from result import result

from vila_ops.config import Stage
from vila_ops.device import describe
from vila_ops.plan.flops import training_flops
from vila_ops.plan.shapes import Shapes, shapes_of

TARGET = 0.45
PEAK_TFLOPS = 989.4
"""Dense bf16 of an H100 SXM, which an H200 has too (NVIDIA's data sheets)."""
WARM_UP, STEPS = (1, 1) if SMALL else (5, 20)


def main() -> None:
    ours = trainee()
    rows = packed(ROWS * PASSES)
    batches = [ours.batch(rows[start : start + ROWS]) for start in range(0, len(rows), ROWS)]
    took = statistics.median([ours.step(batches) for _ in range(WARM_UP + STEPS)][WARM_UP:])
    shapes = shapes_of(ours.model.config)
    flops = sum(_flops(row, shapes, ours.stage) for row in rows)
    mfu = flops / took / (PEAK_TFLOPS * 1e12)
    result(
        "gpu_mfu",
        ours=mfu,
        peer=1.0,
        target=TARGET,
        ok=mfu >= TARGET,
        unit=f"share of {PEAK_TFLOPS} TFLOP/s",
        seconds_per_step=round(took, 4),
        tflops=round(flops / took / 1e12, 3),
        tokens_per_s=round(sum(length for row in rows for length, _ in row) / took, 1),
        weights=sum(p.numel() for p in ours.model.parameters()),
        attention=ours.model.config.text_config._attn_implementation,
        device=describe(ours.device),
    )


def _flops(row: Row, shapes: Shapes, stage: Stage) -> float:
    return training_flops(
        shapes, stage, segments=[length for length, _ in row], images=sum(shows for _, shows in row),
        targets=sum(targets(length, shows) for length, shows in row),
    )  # fmt: skip


if __name__ == "__main__":
    main()
