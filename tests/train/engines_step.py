"""Steps of engines, for `ranks.py`."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vila_ops.model.trainable import set_trainable
from vila_ops.tracking import MetricLog
from vila_ops.train.bad_samples import BadSampleFinder
from vila_ops.train.batch_loader import BatchLoader
from vila_ops.train.engine import TrainEngine, build_engine
from vila_ops.train.job import RankInfo, TrainJob
from vila_ops.train.loop import accumulate_gradients, load
from vila_ops.train.metrics import LossAccumulator
from vila_ops.train.objective import Objective
from vila_ops.train.watchdog import StepWatchdog


def run(task: dict[str, Any], rank_info: RankInfo) -> None:
    """Take a step, and then a step whose gradient is not finite on the last rank only.

    Rank 0 writes norms.json, with both norms and the tensors that the second step changed, and state.safetensors, the
    state after the first step, into the attempt's folder.
    """
    job = TrainJob.model_validate(task)
    model, rows, batches = load(job)
    objective = Objective(model)
    trained = set_trainable(objective, job.stage.trainable, job.stage.tuning)
    engine = build_engine(objective, trained, job.stage, job.resources)
    accumulator = LossAccumulator(job, model, batches, rows.sources())
    bad_samples = BadSampleFinder(job, StepWatchdog(job, rank_info), rows, [], MetricLog(job.resources, None))
    with BatchLoader(job, rank_info, rows, batches) as loader:
        accumulate_gradients(engine, accumulator, loader, step=0, bad_samples=bad_samples)
        norm = float(engine.step(1.0))
        before = state(engine)
        scale = float("nan") if rank_info.rank == rank_info.world_size - 1 else 1.0
        for one in loader.train(1):
            engine.backward(engine.loss(one.batch)[0] * scale)
    broken = float(engine.step(1.0))
    after = state(engine)
    moved = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    if rank_info.rank == 0:
        (Path(job.attempt) / "norms.json").write_text(json.dumps({"norm": norm, "broken": broken, "moved": moved}))
        save_file(before, Path(job.attempt) / "state.safetensors")


def state(engine: TrainEngine) -> dict[str, Tensor]:
    return {
        f"{key}/{name}": tensor.detach().clone().contiguous()
        for name, own in engine.state()
        for key, tensor in own.items()
    }
