"""The planner's memory against what torch's allocator held at most, on one GPU, for steps of different stages.

`ours` is the largest deviation of a forecast, as a share of what was held; target and `peer`: 0.05. Needs a GPU.
VILA_BENCH_SMALL=1 runs the steps on the CPU, where nothing is measured: tests/plan/test_memory.py compares forecasts
with the bytes that are alive there.
"""

import gc
from typing import Any

from gpu_model import PASSES, ROWS, SMALL, device, packed, trainee
from result import result

from vila_ops.device import describe, peak_bytes, reset_peak_bytes

TARGET = 0.05
TWO = {"trainable": ["projector", "language_model"]}
LORA = {"kind": "lora", "rank": 64, "alpha": 128.0, "dropout": 0.0}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all parts": ({}, {}),
    "all parts, recomputed": ({}, {"gradient_checkpointing": True}),
    "pretrain": (TWO, {}),
    "pretrain, recomputed": (TWO, {"gradient_checkpointing": True}),
    "align": ({"trainable": ["projector"]}, {}),
    "lora": ({**TWO, "tuning": LORA}, {}),
}
"""Settings of the stage and of `resources.train`."""


def main() -> None:
    forecasts = {name: measured(stage, train) for name, (stage, train) in CASES.items()}
    worst = max(abs(one["deviation"]) for one in forecasts.values())
    result(
        "gpu_memory",
        ours=worst,
        peer=TARGET,
        target=1.0,
        ok=worst <= TARGET,
        unit="share of the bytes that were held",
        cases=forecasts,
        device=describe(device()),
    )


def measured(stage: dict[str, Any], train: dict[str, Any]) -> dict[str, float]:
    """Forecast and peak of a second step, in GiB, and the forecast's deviation."""
    gc.collect()
    ours = trainee(stage, **train)
    rows = packed(ROWS * PASSES)
    passes = [rows[start : start + ROWS] for start in range(0, len(rows), ROWS)]
    ours.step([ours.batch(each) for each in passes[:1]])
    reset_peak_bytes(ours.device)
    ours.step([ours.batch(each) for each in passes])
    forecast = ours.forecast(passes)
    held = forecast if SMALL else peak_bytes(ours.device)
    return {
        "forecast_gib": round(forecast / 2**30, 3),
        "held_gib": round(held / 2**30, 3),
        "deviation": round(forecast / held - 1, 4),
    }


if __name__ == "__main__":
    main()
