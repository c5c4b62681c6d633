"""The training loop of one worker. Open this module first.

`train` sets up, loops over optimizer steps, and writes the model. One step:

    accumulate_gradients   forward and backward over this rank's rows of the global batch, micro-batch by micro-batch
    engine.step            clip the gradients and update the weights, at this step's learning rate
    every validate_every   loss over the validation rows
    every save_every       a resume checkpoint, written in the background

The same code runs in one process and in many. `data/loading/loader.py` has the order of rows, `objective.py` the loss,
`engine.py` the optimizer step, and `checkpoint/` the resume checkpoints.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vila_ops.artifacts.disk_faults import faults_named
from vila_ops.artifacts.store import content, opened
from vila_ops.config import Stage
from vila_ops.config.train import Lora
from vila_ops.data.loading.loader import RowLoader
from vila_ops.device import describe, device_of, precision_notes
from vila_ops.model import attention, lora
from vila_ops.model import folder as model_folder
from vila_ops.model.build import embedding_std
from vila_ops.model.modify import Modifications
from vila_ops.model.projectors.initialise import fit_to
from vila_ops.model.trainable import keep_frozen_in, set_trainable
from vila_ops.model.vila import VilaForConditionalGeneration
from vila_ops.tracking import MetricLog
from vila_ops.tracking.system import SystemMetrics
from vila_ops.train.bad_samples import BadSampleFinder
from vila_ops.train.batch_builder import BatchBuilder
from vila_ops.train.checkpoint.checkpointer import Checkpointer, Curve
from vila_ops.train.device_faults import DeviceFaults
from vila_ops.train.engine import TrainEngine, build_engine
from vila_ops.train.job import RankInfo, TrainJob
from vila_ops.train.metrics import LossAccumulator, MetricsLogger, StepMetrics
from vila_ops.train.objective import Objective
from vila_ops.train.optim import lr_multiplier
from vila_ops.train.watchdog import StepWatchdog

log = logging.getLogger(__name__)

CURVE = "curve.json"
"""The stage's curve beside its model. Floats are in hex, so that equal text means equal bits."""


def train(job: TrainJob, rank_info: RankInfo) -> dict[str, Any]:
    """Train one stage to its end. Rank 0 writes the model into the attempt's folder. Returns the facts of this rank."""
    run_id = None if rank_info.rank else job.run_id
    with (
        StepWatchdog(job, rank_info) as watchdog,
        MetricLog(job.resources, run_id, system=SystemMetrics()) as metrics,
        DeviceFaults(job) as faults,
    ):
        return _train(job, rank_info, watchdog, metrics, faults)


def _train(
    job: TrainJob, rank_info: RankInfo, watchdog: StepWatchdog, metrics: MetricLog, faults: DeviceFaults
) -> dict[str, Any]:
    stage, is_first = job.stage, rank_info.rank == 0
    torch.set_num_threads(job.resources.train.threads_per_worker)
    model, row_loader, batch_builder = load(job, alive=watchdog.alive)
    faults.model = model
    if is_first:
        slow = precision_notes(stage.precision, batch_builder.device)
        for note in (*slow, *row_loader.composition.notes, *row_loader.notes()):
            log.warning("%s: %s", stage.name, note)
    objective = Objective(model, bf16=stage.precision == "bf16")
    trained = set_trainable(objective, stage.trainable, stage.tuning)
    engine = build_engine(objective, trained, stage, job.resources)
    accumulator = LossAccumulator(job, model, batch_builder, row_loader.sources())

    checkpointer = Checkpointer(job.resume, rank_info, job.resources, live=engine.live)
    step, curve = checkpointer.restore(engine)
    num_steps = row_loader.num_steps()
    bad_samples = BadSampleFinder(job, watchdog, row_loader, curve, metrics)
    if step == 0:
        curve.append({"step": 0, "validation_loss": validate(engine, accumulator, row_loader, watchdog, step=0).loss})
    device = batch_builder.device
    metrics_logger = MetricsLogger(job, metrics, device, step=step, num_steps=num_steps) if is_first else None

    while step < num_steps:
        watchdog.heartbeat(step, "train")
        totals = accumulate_gradients(engine, accumulator, row_loader, job, step=step, bad_samples=bad_samples)
        checkpointer.wait_for_staging()
        multiplier = lr_multiplier(step, stage, num_steps=num_steps)
        grad_norm = engine.step(multiplier)
        bad_samples.check_finite("gradient norm", grad_norm, step=step)
        step += 1
        curve.append({"step": step, "loss": totals.loss})
        bad_samples.check_spike(step, totals.loss)
        if metrics_logger:
            stall = checkpointer.stall_seconds
            metrics_logger.log_step(step, totals, grad_norm=grad_norm, lr_multiplier=multiplier, stall_seconds=stall)
        if step % stage.validate_every == 0 or step == num_steps:
            validation = validate(engine, accumulator, row_loader, watchdog, step=step)
            curve[-1]["validation_loss"] = validation.loss
            if metrics_logger:
                metrics_logger.log_validation(step, validation)
        if step % stage.save_every == 0 and step < num_steps:
            watchdog.heartbeat(step, "save")
            checkpointer.save(step, engine.state(), curve)

    watchdog.heartbeat(step, "finish")
    checkpointer.close()
    save_model(engine, job, curve, rank_info)
    size = job.resources.train.micro_batch_size
    facts = {"rank": rank_info.rank, "device": describe(device), "steps": num_steps, "micro_batch_size": size}
    composition = {"composition": row_loader.composition.model_dump(mode="json")} if is_first else {}
    return {**facts, **engine.facts(), **composition}


def load(
    job: TrainJob, *, alive: Callable[[], None] = lambda: None
) -> tuple[VilaForConditionalGeneration, RowLoader, BatchBuilder]:
    """Return the model on its device, the row loader and the batch builder of a stage.

    `alive` is called whenever a file of the data was compared with its sha256, before its first use.
    """
    stage, resources = job.stage, job.resources
    device = device_of(resources.device)
    files = opened(job.data)
    files.fetch()  # before the first step, whose time the watchdog limits

    def compared(name: str) -> Path:
        path = files.file(name)
        alive()
        return path

    cache = resources.storage.plan_cache()
    row_loader = RowLoader(compared, digest=job.data.digest, stage=stage, cache=cache)
    model = model_folder.load(content(job.init), modifications=modifications_of(stage))
    attention.use(model, attention.choose(resources.train.attention, device, stage.precision))
    batch_builder = BatchBuilder(job, model, device=device)
    if job.fresh_projector and "projector" in stage.trainable:
        rows, _ = row_loader.batch(0)
        images = [image for row in rows for image in row.images]
        if images:
            model.model.vision_tower.to(device)
            fit_to(model.model.multi_modal_projector, batch_builder.feature_cache(images), embedding_std(model))
    dtype = torch.bfloat16 if stage.precision == "bf16" else torch.float32
    if isinstance(stage.tuning, Lora):
        lora.add(model, stage.tuning, seed=stage.seed, dtype=dtype)
    keep_frozen_in(dtype, model, stage.trainable, stage.tuning)
    return model.to(device), row_loader, batch_builder


def modifications_of(stage: Stage) -> Modifications:
    """Return what a stage changes in the architecture of its initial model."""
    return Modifications(image_size=stage.image_size, visual_expert=stage.tuning.kind == "visual_expert")


def accumulate_gradients(
    engine: TrainEngine,
    accumulator: LossAccumulator,
    row_loader: RowLoader,
    job: TrainJob,
    *,
    step: int,
    bad_samples: BadSampleFinder,
) -> StepMetrics:
    """Run forward and backward over this rank's rows of a step. Returns the totals; the loss is in nats per token.

    Raises NonFiniteLoss before the last backward pass if the loss of the global batch is not finite.
    """
    rank_info, size = bad_samples.rank_info, job.resources.train.micro_batch_size
    with accumulator.waiting():
        rows, num_targets = row_loader.batch(step, rank=rank_info.rank, world_size=rank_info.world_size)
    bad_samples.begin_step(rows)
    for start in range(0, len(rows), size):
        micro_batch = rows[start : start + size]
        total, token_losses = engine.loss(accumulator.batch(micro_batch, step=step))
        loss = total / num_targets  # target tokens of the global batch, over all ranks
        accumulator.add(micro_batch, loss, token_losses)
        bad_samples.add(micro_batch, token_losses)
        if start + size >= len(rows):
            totals = accumulator.reduce()
            bad_samples.check_finite("loss", totals.loss, step=step)
        engine.backward(loss)
    return totals


@torch.no_grad()
def validate(
    engine: TrainEngine, accumulator: LossAccumulator, row_loader: RowLoader, watchdog: StepWatchdog, *, step: int
) -> StepMetrics:
    """Return the totals over the validation rows, which the ranks share; the loss is in nats per target token."""
    rank_info, rows = watchdog.rank_info, row_loader.validation()
    for start in range(0, len(rows), rank_info.world_size):  # ZeRO-3 needs equally many passes on all ranks
        watchdog.heartbeat(step, "validate")
        row = rows[min(start + rank_info.rank, len(rows) - 1)]
        loss, token_losses = engine.loss(accumulator.batch([row]))
        if start + rank_info.rank < len(rows):
            accumulator.add([row], loss, token_losses)
    totals = accumulator.reduce()
    return totals._replace(loss=totals.loss / totals.targets)


def save_model(engine: TrainEngine, job: TrainJob, curve: Curve, rank_info: RankInfo) -> None:
    """Write the trained model and the curve on rank 0. The other ranks take part in gathering the weights."""
    trained = {}
    for name, tensors in engine.state():
        if rank_info.rank == 0:
            trained[name.removeprefix("model.")] = tensors["param"].to("cpu", copy=True)
    if rank_info.rank:
        return
    attempt, stage = Path(job.attempt), job.stage
    exact = [{key: value.hex() if isinstance(value, float) else value for key, value in row.items()} for row in curve]
    with faults_named(attempt):
        model_folder.save_trained(
            trained, attempt, init=content(job.init), modifications=modifications_of(stage), tuning=stage.tuning
        )
        (attempt / CURVE).write_text(json.dumps(exact, indent=1))
