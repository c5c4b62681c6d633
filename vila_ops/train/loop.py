"""The training loop of one worker: open this first.

Order of rows, loss and optimizer step are the same for one process and for many; see `data/order/loader.py` for the
order, `objective.py` for the loss and `engine.py` for the step.
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch

from vila_ops.artifacts.store import content
from vila_ops.config import Stage
from vila_ops.config.train import Lora
from vila_ops.data.order.loader import Rows
from vila_ops.model import attention, lora
from vila_ops.model import folder as model_folder
from vila_ops.model.build import embedding_std
from vila_ops.model.change import Change
from vila_ops.model.projectors import fit_to
from vila_ops.model.trainable import keep_frozen_in, set_trainable
from vila_ops.model.vila import VilaForConditionalGeneration
from vila_ops.train.batches import Batches
from vila_ops.train.blame import Blame
from vila_ops.train.checkpoint.saver import Checkpoints, Curve
from vila_ops.train.engine import Engine, build_engine
from vila_ops.train.job import Job, Place
from vila_ops.train.meter import Meter
from vila_ops.train.objective import Objective
from vila_ops.train.optim import rate_factor
from vila_ops.train.watch import Watch

log = logging.getLogger(__name__)

CURVE = "curve.json"
"""The curve of a stage beside its model, floats in hex so that equal text means equal bits."""


def train(job: Job, place: Place) -> dict[str, Any]:
    """Train one stage to its end and leave the model in the attempt's folder (rank 0); returns what really ran."""
    with Watch(job, place) as watch:
        return _train(job, place, watch)


def _train(job: Job, place: Place, watch: Watch) -> dict[str, Any]:
    torch.set_num_threads(job.resources.threads_per_worker)
    torch.manual_seed(job.stage.seed)
    model, rows, batches = load(job)
    if place.rank == 0:
        for note in (*rows.composition.notes, *rows.notes()):
            log.warning("%s: %s", job.stage.name, note)
    objective = Objective(model, bf16=job.stage.precision == "bf16")
    trained = set_trainable(objective, job.stage.trainable, job.stage.tuning)
    engine = build_engine(objective, trained, job.stage, job.resources)
    checkpoints = Checkpoints(job.resume, place, job.resources, live=engine.live)
    step, curve = checkpoints.restore(engine)
    blame = Blame(job, watch, rows, curve)
    num_steps = rows.num_steps()
    watch.beat(step, "validate")
    if step == 0:
        curve.append({"step": 0, "validation_loss": validate(engine, batches, rows, place)})
    meter = Meter(job, step=step, num_steps=num_steps) if place.rank == 0 else None
    while step < num_steps:
        watch.beat(step, "train")
        loss = add_gradients(engine, batches, rows, job, step=step, blame=blame)
        checkpoints.settle()
        norm = engine.step(rate_factor(step, job.stage, num_steps=num_steps))
        blame.check("gradient norm", norm, step=step)
        step += 1
        curve.append({"step": step, "loss": loss})
        blame.look(step, loss)
        if step % job.stage.validate_every == 0 or step == num_steps:
            watch.beat(step, "validate")
            curve[-1]["validation_loss"] = validate(engine, batches, rows, place)
        if meter:
            meter.count(curve[-1], norm=norm)
        if step % job.stage.save_every == 0 and step < num_steps:
            watch.beat(step, "save")
            checkpoints.save(step, engine.state(), curve)
    watch.beat(step, "finish")
    checkpoints.close()
    if meter:
        meter.close()
    finish(engine, job, curve, place)
    said = {"composition": rows.composition.model_dump(mode="json")} if place.rank == 0 else {}
    ran = {"rank": place.rank, "steps": num_steps, "micro_batch_size": job.resources.micro_batch_size}
    return {**ran, **engine.facts(), **said}


def load(job: Job) -> tuple[VilaForConditionalGeneration, Rows, Batches]:
    """Model, rows and batches of a stage."""
    device = torch.device("cuda", torch.cuda.current_device()) if job.resources.gpus_per_worker else torch.device("cpu")
    rows = Rows(content(job.data), digest=job.data.digest, stage=job.stage, cache=job.plan_cache())
    model = model_folder.load(content(job.init), change=change_of(job.stage))
    attention.use(model, attention.choose(job.resources.attention, device, job.stage.precision))
    batches = Batches(job, model, device=device)
    if job.fresh_projector and "projector" in job.stage.trainable:
        first, _ = rows.batch(0)
        images = [image for row in first for image in row.images]
        if images:
            fit_to(model.model.multi_modal_projector, batches.cache(images), embedding_std(model))
    dtype = torch.bfloat16 if job.stage.precision == "bf16" else torch.float32
    if isinstance(job.stage.tuning, Lora):
        lora.add(model, job.stage.tuning, seed=job.stage.seed, dtype=dtype)
    keep_frozen_in(dtype, model, job.stage.trainable, job.stage.tuning)
    return model.to(device), rows, batches


def change_of(stage: Stage) -> Change:
    """What a stage changes of the model that it starts from."""
    return Change(image_size=stage.image_size, visual_expert=stage.tuning.kind == "visual_expert")


def add_gradients(engine: Engine, batches: Batches, rows: Rows, job: Job, *, step: int, blame: Blame) -> float:
    """Forward and backward passes over the global batch of a step; returns its loss in nats per token."""
    place = blame.watch.place
    own, num_targets = rows.batch(step, rank=place.rank, world_size=place.world_size)
    blame.begin(own)
    size = job.resources.micro_batch_size
    value: torch.Tensor | float = 0.0
    for start in range(0, len(own), size):
        micro = own[start : start + size]
        total, each = engine.loss(batches(micro, step=step))
        blame.saw(micro, each)
        loss = total / num_targets
        value = value + loss.detach().double()  # stays on the device: reading it waits for all that was asked of a GPU
        if start + size >= len(own):
            value = _sum(float(value))
            blame.check("loss", value, step=step)
        engine.backward(loss)
    return float(value)


@torch.no_grad()
def validate(engine: Engine, batches: Batches, rows: Rows, place: Place) -> float:
    """Mean loss in nats per token over the validation rows, which the ranks share."""
    held_out = rows.validation()
    num_targets = sum(int((row.labels >= 0).sum()) for row in held_out)
    value = 0.0
    for start in range(0, len(held_out), place.world_size):  # every rank passes equally often, as ZeRO-3 needs
        row = held_out[min(start + place.rank, len(held_out) - 1)]
        loss, _ = engine.loss(batches([row]))
        value += float(loss) if start + place.rank < len(held_out) else 0.0
    return _sum(value) / num_targets


def finish(engine: Engine, job: Job, curve: Curve, place: Place) -> None:
    """Rank 0 writes the trained model and the curve; the other ranks help to gather."""
    trained = {name.removeprefix("model."): tensors["param"].cpu().clone() for name, tensors in engine.state()}
    if place.rank:
        return
    attempt = Path(job.attempt)
    stage = job.stage
    model_folder.save_trained(trained, attempt, init=content(job.init), change=change_of(stage), tuning=stage.tuning)
    exact = [{key: value.hex() if isinstance(value, float) else value for key, value in row.items()} for row in curve]
    (attempt / CURVE).write_text(json.dumps(exact, indent=1))


def _sum(value: float) -> float:
    """Sum over all ranks."""
    if not torch.distributed.is_initialized():
        return value
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"  # NCCL takes nothing from the host
    total = torch.tensor(value, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return float(total)
