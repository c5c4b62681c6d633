"""The training loop of one worker: open this first.

Order of rows, loss and optimizer step are the same for one process and for many; see `data/loading/loader.py` for the
order, `objective.py` for the loss and `engine.py` for the step.
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch

from vila_ops.artifacts.store import content, opened
from vila_ops.config import Stage
from vila_ops.config.train import Lora
from vila_ops.data.loading.loader import RowLoader
from vila_ops.model import attention, lora
from vila_ops.model import folder as model_folder
from vila_ops.model.build import embedding_std
from vila_ops.model.change import Change
from vila_ops.model.projectors.initialise import fit_to
from vila_ops.model.trainable import keep_frozen_in, set_trainable
from vila_ops.model.vila import VilaForConditionalGeneration
from vila_ops.tracking import MetricLog
from vila_ops.tracking.system import SystemMetrics
from vila_ops.train.bad_samples import BadSampleFinder
from vila_ops.train.batch_builder import BatchBuilder
from vila_ops.train.checkpoint.checkpointer import Checkpointer, Curve
from vila_ops.train.engine import Engine, build_engine
from vila_ops.train.job import RankInfo, TrainJob
from vila_ops.train.metrics import LossAccumulator, MetricsLogger, StepMetrics
from vila_ops.train.objective import Objective
from vila_ops.train.optim import lr_multiplier
from vila_ops.train.watchdog import StepWatchdog

log = logging.getLogger(__name__)

CURVE = "curve.json"
"""The curve of a stage beside its model, floats in hex so that equal text means equal bits."""


def train(job: TrainJob, place: RankInfo) -> dict[str, Any]:
    """Train one stage to its end and leave the model in the attempt's folder (rank 0); returns what really ran."""
    run_id = None if place.rank else job.run_id
    with StepWatchdog(job, place) as watch, MetricLog(job.resources, run_id, system=SystemMetrics()) as metrics:
        return _train(job, place, watch, metrics)


def _train(job: TrainJob, place: RankInfo, watch: StepWatchdog, metrics: MetricLog) -> dict[str, Any]:
    torch.set_num_threads(job.resources.train.threads_per_worker)
    model, rows, batches = load(job)
    if place.rank == 0:
        for note in (*rows.composition.notes, *rows.notes()):
            log.warning("%s: %s", job.stage.name, note)
    objective = Objective(model, bf16=job.stage.precision == "bf16")
    trained = set_trainable(objective, job.stage.trainable, job.stage.tuning)
    engine = build_engine(objective, trained, job.stage, job.resources)
    checkpoints = Checkpointer(job.resume, place, job.resources, live=engine.live)
    step, curve = checkpoints.restore(engine)
    blame = BadSampleFinder(job, watch, rows, curve, metrics)
    num_steps = rows.num_steps()
    tally = LossAccumulator(job, model, batches, rows.sources())
    if step == 0:
        held_out = validate(engine, tally, rows, watch, step=step)
        curve.append({"step": 0, "validation_loss": held_out.loss})
    meter = MetricsLogger(job, metrics, step=step, num_steps=num_steps) if place.rank == 0 else None
    while step < num_steps:
        watch.beat(step, "train")
        seen = add_gradients(engine, tally, rows, job, step=step, blame=blame)
        checkpoints.settle()
        factor = lr_multiplier(step, job.stage, num_steps=num_steps)
        norm = engine.step(factor)
        blame.check("gradient norm", norm, step=step)
        step += 1
        curve.append({"step": step, "loss": seen.loss})
        blame.look(step, seen.loss)
        if meter:
            meter.count(step, seen, norm=norm, factor=factor, stalled=checkpoints.stall_seconds)
        if step % job.stage.validate_every == 0 or step == num_steps:
            held_out = validate(engine, tally, rows, watch, step=step)
            curve[-1]["validation_loss"] = held_out.loss
            if meter:
                meter.validated(step, held_out)
        if step % job.stage.save_every == 0 and step < num_steps:
            watch.beat(step, "save")
            checkpoints.save(step, engine.state(), curve)
    watch.beat(step, "finish")
    checkpoints.close()
    finish(engine, job, curve, place)
    said = {"composition": rows.composition.model_dump(mode="json")} if place.rank == 0 else {}
    ran = {"rank": place.rank, "steps": num_steps, "micro_batch_size": job.resources.train.micro_batch_size}
    return {**ran, **engine.facts(), **said}


def load(job: TrainJob) -> tuple[VilaForConditionalGeneration, RowLoader, BatchBuilder]:
    """Model, rows and batches of a stage."""
    resources = job.resources
    on_gpu = bool(resources.train.gpus_per_worker)
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    if "://" in job.data.uri:
        content(job.data)  # every shard is downloaded before the first step, whose time the watchdog limits
    cache = resources.storage.plan_cache()
    rows = RowLoader(opened(job.data).file, digest=job.data.digest, stage=job.stage, cache=cache)
    model = model_folder.load(content(job.init), change=change_of(job.stage))
    attention.use(model, attention.choose(resources.train.attention, device, job.stage.precision))
    batches = BatchBuilder(job, model, device=device)
    if job.fresh_projector and "projector" in job.stage.trainable:
        first, _ = rows.batch(0)
        images = [image for row in first for image in row.images]
        if images:
            model.model.vision_tower.to(device)
            fit_to(model.model.multi_modal_projector, batches.cache(images), embedding_std(model))
    dtype = torch.bfloat16 if job.stage.precision == "bf16" else torch.float32
    if isinstance(job.stage.tuning, Lora):
        lora.add(model, job.stage.tuning, seed=job.stage.seed, dtype=dtype)
    keep_frozen_in(dtype, model, job.stage.trainable, job.stage.tuning)
    return model.to(device), rows, batches


def change_of(stage: Stage) -> Change:
    """What a stage changes of the model that it starts from."""
    return Change(image_size=stage.image_size, visual_expert=stage.tuning.kind == "visual_expert")


def add_gradients(
    engine: Engine, tally: LossAccumulator, rows: RowLoader, job: TrainJob, *, step: int, blame: BadSampleFinder
) -> StepMetrics:
    """Forward and backward passes over the global batch of a step; its loss is in nats per token."""
    place = blame.watch.place
    with tally.waiting():
        own, num_targets = rows.batch(step, rank=place.rank, world_size=place.world_size)
    blame.begin(own)
    size = job.resources.train.micro_batch_size
    for start in range(0, len(own), size):
        micro = own[start : start + size]
        total, each = engine.loss(tally.batch(micro, step=step))
        loss = total / num_targets
        tally.add(micro, loss, each)
        blame.saw(micro, each)
        if start + size >= len(own):
            seen = tally.read()
            blame.check("loss", seen.loss, step=step)
        engine.backward(loss)
    return seen


@torch.no_grad()
def validate(engine: Engine, tally: LossAccumulator, rows: RowLoader, watch: StepWatchdog, *, step: int) -> StepMetrics:
    """Mean loss in nats per token over the validation rows, which the ranks share, after `step` steps."""
    place, held_out = watch.place, rows.validation()
    for start in range(0, len(held_out), place.world_size):  # every rank passes equally often, as ZeRO-3 needs
        watch.beat(step, "validate")
        row = held_out[min(start + place.rank, len(held_out) - 1)]
        loss, each = engine.loss(tally.batch([row]))
        if start + place.rank < len(held_out):
            tally.add([row], loss, each)
    seen = tally.read()
    return seen._replace(loss=seen.loss / seen.targets)


def finish(engine: Engine, job: TrainJob, curve: Curve, place: RankInfo) -> None:
    """Rank 0 writes the trained model and the curve; the other ranks help to gather."""
    trained = {}
    for name, tensors in engine.state():
        if place.rank == 0:
            trained[name.removeprefix("model.")] = tensors["param"].to("cpu", copy=True)
    if place.rank:
        return
    attempt = Path(job.attempt)
    stage = job.stage
    model_folder.save_trained(trained, attempt, init=content(job.init), change=change_of(stage), tuning=stage.tuning)
    exact = [{key: value.hex() if isinstance(value, float) else value for key, value in row.items()} for row in curve]
    (attempt / CURVE).write_text(json.dumps(exact, indent=1))
