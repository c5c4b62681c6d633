"""What a sealed artifact took to make: time, GPU-hours, token positions and money, read from its manifest."""

from collections.abc import Mapping
from typing import Any

from vila_ops.artifacts.store import read_manifest
from vila_ops.config import Config, Resources

CPU = "cpu"


class TaskCost(Config):
    """What one task took. Of a stage that was killed and resumed: its last attempt."""

    task: str
    name: str
    uri: str
    sealed: str
    """When it was sealed: UTC, ISO 8601."""
    seconds: float
    workers: int
    gpu_hours: float
    """Hours of all GPUs together."""
    positions: int | None
    """Token positions that a stage trained on, padding included: steps x global batch x sequence length."""
    money: float | None
    """GPU-hours x price of `resources.train.accelerator`; None without a price."""


def cost_of(task: str, name: str, uri: str, resources: Resources) -> TaskCost:
    """What a sealed artifact took. Raises CorruptArtifact."""
    manifest = read_manifest(uri)
    execution = manifest["execution"]
    gpus = sum(not str(worker.get("device", CPU)).startswith(CPU) for worker in execution["workers"])
    hours = gpus * execution["seconds"] / 3600
    accelerator = resources.train.accelerator
    price = accelerator.price_per_hour if accelerator else 0.0
    stage = manifest["recipe"].get("stage") if task in ("train", "train_stage") else None
    return TaskCost(
        task=task,
        name=name,
        uri=uri,
        sealed=execution["sealed"],
        seconds=execution["seconds"],
        workers=max(1, len(execution["workers"])),
        gpu_hours=hours,
        positions=positions_of(stage, manifest["facts"]["step"]) if stage else None,
        money=hours * price if price else None,
    )


def positions_of(stage: Mapping[str, Any], steps: int) -> int:
    """Token positions of steps of a stage, by its settings."""
    return steps * int(stage["global_batch_size"]) * int(stage["sequence_length"])


def timed_positions(manifest: Mapping[str, Any]) -> int:
    """Token positions of a sealed stage that its last attempt trained on, in the time that its manifest has."""
    workers = manifest["execution"]["workers"]
    first = workers[0].get("first_step", 0) if workers else 0
    return positions_of(manifest["recipe"]["stage"], manifest["facts"]["step"] - first)
