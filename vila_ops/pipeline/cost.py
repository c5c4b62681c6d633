"""What a sealed artifact took to make: time, GPU-hours, token positions, money and energy, read from its manifest."""

from collections.abc import Sequence
from typing import Any

from vila_ops.artifacts.store import read_manifest
from vila_ops.config import Config, Resources
from vila_ops.train.pace import positions_of

CPU = "cpu"
Json = dict[str, Any]


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
    cpu_joules: float | None = None
    """Energy of the processors and the memory of a stage's machines, whatever else ran there; None if not readable."""
    gpu_joules: float | None = None
    """Energy of a stage's GPUs; None if not readable, or without any."""


def cost_of(task: str, name: str, uri: str, resources: Resources) -> TaskCost:
    """What a sealed artifact took. Raises CorruptArtifact."""
    manifest = read_manifest(uri)
    execution = manifest["execution"]
    with_gpu = [worker for worker in execution["workers"] if not str(worker.get("device", CPU)).startswith(CPU)]
    hours = len(with_gpu) * execution["seconds"] / 3600
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
        cpu_joules=_of_machines(execution["workers"]),
        gpu_joules=_sum([worker.get("gpu_joules") for worker in with_gpu]),
    )


def _of_machines(workers: Sequence[Json]) -> float | None:
    """The sum over machines: each worker counts the whole of its own, and the longest count of several is taken."""
    machines: dict[str | None, list[Json]] = {}
    for worker in workers:
        machines.setdefault(worker.get("node"), []).append(worker)
    counted = [[one["cpu_joules"] for one in there if "cpu_joules" in one] for there in machines.values()]
    return _sum([max(joules, default=None) for joules in counted])


def _sum(joules: Sequence[float | None]) -> float | None:
    """None where a part is not known, or there is none."""
    known = [one for one in joules if one is not None]
    return sum(known) if known and len(known) == len(joules) else None
