"""Whole stages, for `ranks.py`."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from vila_ops.train import loop
from vila_ops.train.engine import DeepSpeedEngine
from vila_ops.train.job import RankInfo, TrainJob

honest = DeepSpeedEngine.backward


def run(task: dict[str, Any], rank_info: RankInfo) -> None:
    """Train a job. Rank 0 writes ran.json, the facts that the loop returns, beside the curve.

    The last rank multiplies its loss by `scale` before the backward pass.
    """
    job = TrainJob.model_validate(task["job"])
    scale = task["scale"] if rank_info.rank == rank_info.world_size - 1 else 1.0

    def backward(engine: DeepSpeedEngine, loss: Tensor) -> None:
        honest(engine, loss * scale)

    DeepSpeedEngine.backward = backward if scale != 1 else honest  # type: ignore[method-assign]
    ran = loop.train(job, rank_info)
    if rank_info.rank == 0:
        (Path(job.attempt) / "ran.json").write_text(json.dumps(ran))
