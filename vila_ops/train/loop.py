"""The training loop of one worker. Open this module first.

`train` sets up, loops over optimizer steps, and writes the model. One step:

    accumulate_gradients   forward and backward over this rank's rows of the global batch, micro-batch by micro-batch
    engine.step            clip the gradients and update the weights, at this step's learning rate
    accumulator.reduce     loss and gradient norm of the step: here the host waits for the device, and nowhere before
    every validate_every   loss over the validation rows
    every save_every       a resume checkpoint, written in the background

The same code runs in one process and in many. `data/loading/loader.py` has the order of rows, `batch_loader.py` reads
them ahead, `objective.py` has the loss, `engine.py` the optimizer step, and `checkpoint/` the resume checkpoints.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vila_ops import tracing
from vila_ops.artifacts.disk_faults import faults_named
from vila_ops.artifacts.store import content, opened
from vila_ops.config import Stage
from vila_ops.config.train import Lora
from vila_ops.data.loading.loader import RowLoader
from vila_ops.device import describe, device_of, nvml_uuid, precision_notes
from vila_ops.energy import EnergyMeter
from vila_ops.model import attention, lora
from vila_ops.model import folder as model_folder
from vila_ops.model.modify import Modifications
from vila_ops.model.trainable import compute_in, set_trainable
from vila_ops.model.vila import VilaForConditionalGeneration
from vila_ops.tracking import MetricLog
from vila_ops.tracking.system import SystemMetrics
from vila_ops.train.bad_samples import BadSampleFinder
from vila_ops.train.batch_builder import BatchBuilder
from vila_ops.train.batch_loader import BatchLoader
from vila_ops.train.checkpoint.checkpointer import Checkpointer, Curve
from vila_ops.train.curve import CURVE
from vila_ops.train.device_faults import DeviceFaults
from vila_ops.train.engine import TrainEngine, build_engine
from vila_ops.train.job import RankInfo, TrainJob
from vila_ops.train.metrics import LossAccumulator, MetricsLogger, StepMetrics
from vila_ops.train.objective import Objective
from vila_ops.train.optim import lr_multiplier
from vila_ops.train.preemption import PreemptionNotice
from vila_ops.train.profile import StepProfiler, span
from vila_ops.train.projector_fit import fit_projector
from vila_ops.train.watchdog import StepWatchdog

log = logging.getLogger(__name__)


def train(job: TrainJob, rank_info: RankInfo) -> dict[str, Any]:
    """Train one stage to its end. Rank 0 writes the model into the attempt's folder. Returns the facts of this rank."""
    run_id = None if rank_info.rank else job.run_id
    ids: dict[str, str | int | None] = {
        "stage": job.stage.name,
        "address": Path(job.resume).name,
        "mlflow_run": job.run_id,
        "rank": rank_info.rank,
    }
    with (
        tracing.work("train_stage", f"{job.stage.name}, rank {rank_info.rank}", parent=job.context.trace, **ids),
        StepWatchdog(job, rank_info) as watchdog,
        MetricLog(job.resources, run_id, system=SystemMetrics()) as metrics,
        DeviceFaults(job) as faults,
        PreemptionNotice() as notice,
    ):
        torch.set_num_threads(job.resources.train.threads_per_worker)
        model, row_loader, batch_builder = load(job, alive=watchdog.alive)
        faults.model = model
        with (
            BatchLoader(job, rank_info, row_loader, batch_builder) as batches,
            StepProfiler(job, rank_info, metrics) as profiler,
        ):
            return _train(job, model, batches, watchdog, profiler, notice)


def _train(
    job: TrainJob,
    model: VilaForConditionalGeneration,
    batches: BatchLoader,
    watchdog: StepWatchdog,
    profiler: StepProfiler,
    notice: PreemptionNotice,
) -> dict[str, Any]:
    stage, rank_info, row_loader = job.stage, batches.rank_info, batches.row_loader
    is_first, device, metrics = rank_info.rank == 0, batches.batch_builder.device, profiler.metrics
    energy = EnergyMeter(nvml_uuid(device))
    if is_first:
        _log_notes(stage, row_loader, device)
    objective = Objective(model)
    trained = set_trainable(objective, stage.trainable, stage.tuning)
    engine = build_engine(objective, trained, stage, job.resources)
    accumulator = LossAccumulator(job, model, batches.batch_builder, row_loader.sources())

    checkpointer = Checkpointer(job.resume, rank_info, job.resources, live=engine.live)
    step, curve = checkpointer.restore(engine)
    first_step = step
    num_steps = row_loader.num_steps()
    bad_samples = BadSampleFinder(job, watchdog, row_loader, curve, metrics)
    if step == 0:
        curve.append({"step": 0, "validation_loss": validate(engine, accumulator, batches, watchdog, step=0).loss})
    metrics_logger = MetricsLogger(job, metrics, device, step=step, num_steps=num_steps) if is_first else None
    watchdog.metrics = metrics_logger.newest if metrics_logger else {}

    while step < num_steps:
        watchdog.heartbeat(step, "train")
        accumulate_gradients(engine, accumulator, batches, step=step, bad_samples=bad_samples)
        checkpointer.wait_for_staging()
        multiplier = lr_multiplier(step, stage, num_steps=num_steps)
        with span("update"):
            grad_norm = engine.step(multiplier)
        with span("waiting"):
            totals = accumulator.reduce(grad_norm)
        bad_samples.check_finite("loss", totals.loss, step=step)
        bad_samples.check_finite("gradient norm", totals.grad_norm, step=step)
        step += 1
        curve.append({"step": step, "loss": totals.loss})
        bad_samples.check_spike(step, totals.loss)
        if metrics_logger:
            metrics_logger.log_step(step, totals, lr_multiplier=multiplier, stall_seconds=checkpointer.stall_seconds)
        if step % stage.validate_every == 0 or step == num_steps:
            validation = validate(engine, accumulator, batches, watchdog, step=step)
            curve[-1]["validation_loss"] = validation.loss
            if metrics_logger:
                metrics_logger.log_validation(step, validation)
        if metrics_logger:
            watchdog.metrics = {**metrics_logger.newest, **checkpointer.saved_at}
        if step < num_steps and (step % stage.save_every == 0 or notice.given):
            watchdog.heartbeat(step, "save")
            checkpointer.save(step, engine.state(), curve)
            notice.obey(stage.name, step, written=checkpointer.close)
        profiler.step(step)
        energy.note()

    watchdog.heartbeat(step, "finish")
    checkpointer.close()
    save_model(engine, job, curve, rank_info)
    return {**_facts(job, batches, first_step=first_step), **energy.joules(), **engine.facts()}


def _facts(job: TrainJob, batches: BatchLoader, *, first_step: int) -> dict[str, Any]:
    """What a rank was given to do; rank 0 tells the composition of the data, too."""
    row_loader, rank = batches.row_loader, batches.rank_info.rank
    facts = {
        "rank": rank,
        "device": describe(batches.batch_builder.device),
        "steps": row_loader.num_steps(),
        "first_step": first_step,
        "micro_batch_size": job.resources.train.micro_batch_size,
    }
    return facts if rank else {**facts, "composition": row_loader.composition.model_dump(mode="json")}


def _log_notes(stage: Stage, row_loader: RowLoader, device: torch.device) -> None:
    for note in (*precision_notes(stage.precision, device), *row_loader.composition.notes, *row_loader.notes()):
        log.warning("%s: %s", stage.name, note)


def load(
    job: TrainJob, *, alive: Callable[[], None] = lambda: None
) -> tuple[VilaForConditionalGeneration, RowLoader, BatchBuilder]:
    """Return the model, the row loader and the batch builder of a stage.

    The model is in the host's memory and in fp32, for the engine to move; a frozen tower is on its device and in the
    stage's precision. `alive` is called whenever a file of the data was compared with its sha256, before its first use,
    and while a fresh projector is fitted.
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
    train = resources.train
    attention.use(model, attention.choose(train.attention, device, stage.precision, compiled=train.compile))
    dtype = torch.bfloat16 if stage.precision == "bf16" else torch.float32
    if "vision_tower" not in stage.trainable:
        compute_in(dtype, model.model.vision_tower, {})
        model.model.vision_tower.to(device)
    batch_builder = BatchBuilder(job, model, device=device)
    if job.fresh_projector and "projector" in stage.trainable:
        fit_projector(model, row_loader, batch_builder, alive=alive)
    if isinstance(stage.tuning, Lora):
        lora.add(model, stage.tuning, seed=stage.seed, dtype=dtype)
    return model, row_loader, batch_builder


def modifications_of(stage: Stage) -> Modifications:
    """Return what a stage changes in the architecture of its initial model."""
    return Modifications(image_size=stage.image_size, visual_expert=stage.tuning.kind == "visual_expert")


def accumulate_gradients(
    engine: TrainEngine, accumulator: LossAccumulator, batches: BatchLoader, *, step: int, bad_samples: BadSampleFinder
) -> None:
    """Run forward and backward over this rank's rows of a step. The losses are added up, in nats per target token."""
    bad_samples.begin_step()
    for micro_batch in batches.train(step):
        bad_samples.begin_micro_batch(micro_batch.rows)
        with span("forward"):
            total, token_losses = engine.loss(micro_batch.batch)
        loss = total / micro_batch.num_targets  # of the global batch, over all ranks
        accumulator.add(micro_batch.rows, loss, token_losses, wait_seconds=micro_batch.wait_seconds)
        bad_samples.add(micro_batch.rows, token_losses)
        # A loss that is not finite makes all gradients NaN, so that no rank updates anything before the host knows it.
        with span("backward"):
            engine.backward(loss * (1 + 0 * loss.detach()))


@torch.no_grad()
def validate(
    engine: TrainEngine, accumulator: LossAccumulator, batches: BatchLoader, watchdog: StepWatchdog, *, step: int
) -> StepMetrics:
    """Return the totals over the validation rows, which the ranks share; the loss is in nats per target token."""
    watchdog.heartbeat(step, "validate")
    for micro_batch in batches.validation():
        loss, token_losses = engine.loss(micro_batch.batch)
        if micro_batch.rows:
            accumulator.add(micro_batch.rows, loss, token_losses)
        watchdog.heartbeat(step, "validate")
    totals = accumulator.reduce()
    return totals._replace(loss=totals.loss / totals.targets)


def save_model(engine: TrainEngine, job: TrainJob, curve: Curve, rank_info: RankInfo) -> None:
    """Write the trained model and the curve on rank 0, and log what validation gave.

    The other ranks take part in gathering the weights.
    """
    trained = {}
    for name, tensors in engine.state():
        if rank_info.rank == 0:
            trained[name] = tensors["param"].to("cpu", copy=True)
    if rank_info.rank:
        return
    write_model(trained, curve, Path(job.attempt), stage=job.stage, init=content(job.init))
    before, after = curve[0]["validation_loss"], curve[-1]["validation_loss"]
    log.info("%s: validation loss %.3f before the first step, %.3f after the last", job.stage.name, before, after)


def write_model(trained: dict[str, Tensor], curve: Curve, folder: Path, *, stage: Stage, init: Path) -> None:
    """Write a model folder with the trained parameters, by their names in the engine, and the curve.

    `init` is the folder of the model that the stage started from.
    """
    named = {name.removeprefix("model."): tensor for name, tensor in trained.items()}
    exact = [{key: value.hex() if isinstance(value, float) else value for key, value in row.items()} for row in curve]
    with faults_named(folder):
        model_folder.save_trained(named, folder, init=init, modifications=modifications_of(stage), tuning=stage.tuning)
        (folder / CURVE).write_text(json.dumps(exact, indent=1))
