"""The training loop of one worker: open this first.

Order of rows, loss and optimizer step are the same for one process and for many; see `data/order/loader.py` for the
order, `objective.py` for the loss and `engine.py` for the step.
"""

import functools
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch

from vila_ops.artifacts.store import content
from vila_ops.config import Stage
from vila_ops.config.train import Lora
from vila_ops.data.images import pixels
from vila_ops.data.order.loader import Rows, stack
from vila_ops.data.order.packing import Row, attention_mask
from vila_ops.model import folder as model_folder
from vila_ops.model import lora
from vila_ops.model.build import embedding_std
from vila_ops.model.change import Change
from vila_ops.model.features import FeatureCache
from vila_ops.model.projectors import fit_to
from vila_ops.model.trainable import keep_frozen_in, set_trainable
from vila_ops.model.vila import VilaForConditionalGeneration
from vila_ops.tracking import MetricLog
from vila_ops.train import checkpoint
from vila_ops.train.engine import Engine, build_engine
from vila_ops.train.job import Job, NonFiniteLoss, Place
from vila_ops.train.objective import Batch, Objective
from vila_ops.train.optim import rate_factor

log = logging.getLogger(__name__)

CURVE = "curve.json"
"""The curve of a stage beside its model, floats in hex so that equal text means equal bits."""
LINES = 20
"""Progress lines of a stage."""
Curve = list[dict[str, Any]]
"""Per step: its number, loss, and validation loss where there was one."""


def train(job: Job, place: Place) -> dict[str, Any]:
    """Train one stage to its end and leave the model in the attempt's folder (rank 0); returns what really ran."""
    torch.set_num_threads(job.resources.threads_per_worker)
    torch.manual_seed(job.stage.seed)
    model, rows, batches = load(job)
    if place.rank == 0:
        for note in (*rows.composition.notes, *rows.notes()):
            log.warning("%s: %s", job.stage.name, note)
    objective = Objective(model, bf16=job.stage.precision == "bf16")
    trained = set_trainable(objective, job.stage.trainable, job.stage.tuning)
    engine = build_engine(objective, trained, job.stage, job.resources)
    step, curve = restore(engine, Path(job.resume))
    metrics = MetricLog(job.resources.tracking_uri, job.run_id if place.rank == 0 else None)
    num_steps = rows.num_steps()
    metrics.log({"num_steps": num_steps}, step=step)
    if step == 0:
        curve.append({"step": 0, "validation_loss": validate(engine, batches, rows, place)})
    clock = Clock(step, num_steps)
    while step < num_steps:
        loss = add_gradients(engine, batches, rows, job, step=step, place=place)
        norm = engine.step(rate_factor(step, job.stage, num_steps=num_steps))
        if not math.isfinite(norm):
            raise _not_finite(f"gradient norm {norm}", rows, step=step, place=place)
        step += 1
        curve.append({"step": step, "loss": loss})
        if step % job.stage.validate_every == 0 or step == num_steps:
            curve[-1]["validation_loss"] = validate(engine, batches, rows, place)
        if place.rank == 0:
            metrics.log({**curve[-1], "grad_norm": norm, "seconds_per_step": clock.tick()}, step=step)
            if step == 1 or step % max(1, num_steps // LINES) == 0:
                shown = (job.stage.name, step, num_steps, loss, clock.left(step))
                log.info("%s step %d/%d  loss %.3f  %s", *shown)
        if step % job.stage.save_every == 0 and step < num_steps:
            checkpoint.save(Path(job.resume), step=step, states=engine.state(), curve=curve, place=place)
    metrics.flush()
    finish(engine, job, curve, place)
    said = {"composition": rows.composition.model_dump(mode="json")} if place.rank == 0 else {}
    ran = {"rank": place.rank, "steps": num_steps, "micro_batch_size": job.resources.micro_batch_size}
    return {**ran, **engine.facts(), **said}


def load(job: Job) -> tuple[VilaForConditionalGeneration, Rows, "Batches"]:
    """Model, rows and batches of a stage."""
    device = torch.device("cuda", torch.cuda.current_device()) if job.resources.gpus_per_worker else torch.device("cpu")
    rows = Rows(content(job.data), digest=job.data.digest, stage=job.stage, cache=job.plan_cache())
    model = model_folder.load(content(job.init), change=change_of(job.stage))
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


def add_gradients(engine: Engine, batches: "Batches", rows: Rows, job: Job, *, step: int, place: Place) -> float:
    """Forward and backward passes over the global batch of a step; returns its loss in nats per token."""
    own, num_targets = rows.batch(step, rank=place.rank, world_size=place.world_size)
    size = job.resources.micro_batch_size
    value = 0.0
    for start in range(0, len(own), size):
        loss = engine.loss(batches(own[start : start + size], step=step)) / num_targets
        value += float(loss.detach())
        if start + size >= len(own):
            value = _sum(value)
            if not math.isfinite(value):
                raise _not_finite(f"loss {value}", rows, step=step, place=place)
        engine.backward(loss)
    return value


@torch.no_grad()
def validate(engine: Engine, batches: "Batches", rows: Rows, place: Place) -> float:
    """Mean loss in nats per token over the validation rows, which the ranks share."""
    held_out = rows.validation()
    num_targets = sum(int((row.labels >= 0).sum()) for row in held_out)
    value = 0.0
    for start in range(0, len(held_out), place.world_size):  # every rank passes equally often, as ZeRO-3 needs
        row = held_out[min(start + place.rank, len(held_out) - 1)]
        loss = float(engine.loss(batches([row])))
        value += loss if start + place.rank < len(held_out) else 0.0
    return _sum(value) / num_targets


class Batches:
    """Rows to tensors on the device, with the features of their pictures."""

    def __init__(self, job: Job, model: VilaForConditionalGeneration, *, device: torch.device) -> None:
        mean, std = model_folder.normalisation(content(job.init))
        self.device, self.seed = device, job.stage.seed
        self.pixels = functools.partial(pixels, mean=mean, std=std)
        self.tower_trains = "vision_tower" in job.stage.trainable
        self.cache = FeatureCache(model, self.pixels, root=job.feature_cache())

    def __call__(self, rows: list[Row], *, step: int | None = None) -> Batch:
        """One micro-batch of a training step, or, without one, of a validation."""
        input_ids, position_ids, segment_ids, labels = (torch.from_numpy(array) for array in stack(rows))
        images = [image for row in rows for image in row.images]
        features = pixel_values = None
        if images and self.tower_trains:
            pixel_values = torch.from_numpy(self.pixels(images)).to(self.device)
        elif images:
            features = self.cache(images).to(self.device)
        mask = torch.from_numpy(attention_mask(segment_ids.numpy()))
        return Batch(
            input_ids=input_ids.to(self.device),
            position_ids=position_ids.to(self.device),
            mask=mask.to(self.device),
            labels=labels.to(self.device),
            features=features,
            pixel_values=pixel_values,
            draws=None if step is None else tuple(lora.draw(self.seed, step, row.keys) for row in rows),
        )


class Clock:
    """Seconds per step and time left, from the steps of this process."""

    def __init__(self, step: int, num_steps: int) -> None:
        self.first, self.num_steps = step, num_steps
        self.started = self.last = time.monotonic()

    def tick(self) -> float:
        """Seconds since the last tick."""
        now = time.monotonic()
        seconds, self.last = now - self.last, now
        return seconds

    def left(self, step: int) -> str:
        """Time left at the mean pace so far."""
        pace = (self.last - self.started) / max(1, step - self.first)
        seconds = round(pace * (self.num_steps - step))
        return f"{seconds // 60}:{seconds % 60:02d} left"


def restore(engine: Engine, resume: Path) -> tuple[int, Curve]:
    """Steps done and their curve: 0 and nothing when there is no checkpoint to resume from."""
    found = checkpoint.newest(resume)
    if found is None:
        return 0, []
    states, manifest = found
    engine.restore(states, step=manifest["step"])
    log.info("resuming after step %d", manifest["step"])
    return manifest["step"], manifest["curve"]


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


def _not_finite(what: str, rows: Rows, *, step: int, place: Place) -> NonFiniteLoss:
    own, _ = rows.batch(step, rank=place.rank, world_size=place.world_size)
    keys = [key for row in own for key in row.keys]
    return NonFiniteLoss(f"{what} at step {step + 1}; nothing was updated. This rank's samples: {keys}")


def _sum(value: float) -> float:
    """Sum over all ranks."""
    if not torch.distributed.is_initialized():
        return value
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"  # NCCL takes nothing from the host
    total = torch.tensor(value, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return float(total)
