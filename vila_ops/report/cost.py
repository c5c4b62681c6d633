"""What sealed artifacts took to make: time, GPU-hours, token positions and money, read from their manifests."""

from collections.abc import Iterable, Sequence
from typing import Any

from vila_ops.artifacts.store import read_manifest
from vila_ops.config import Config, Resources, Run
from vila_ops.pipeline.explain import explain

Json = dict[str, Any]
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
        positions=manifest["facts"]["step"] * stage["global_batch_size"] * stage["sequence_length"] if stage else None,
        money=hours * price if price else None,
    )


def costs_of(run: Run) -> tuple[list[TaskCost], int]:
    """What the sealed artifacts of a recipe took, in the order of a run, and how many more it would make."""
    steps = [step for step in explain(run) if step.status != "reconciles"]
    sealed = [cost_of(step.task, step.name, step.uri, run.resources) for step in steps if step.uri is not None]
    return sealed, len(steps) - len(sealed)


def table(costs: Sequence[TaskCost | Json]) -> list[Json]:
    """Rows for people, with a total in the last one."""
    rows = [TaskCost.model_validate(one) for one in costs]
    return [*map(_row, rows), _total(rows)] if rows else []


def _row(one: TaskCost) -> Json:
    return {
        "task": one.task,
        "name": one.name,
        "minutes": round(one.seconds / 60, 1),
        "workers": one.workers,
        "GPU-hours": round(one.gpu_hours, 3),
        "token positions": one.positions or "",
        "money": "" if one.money is None else round(one.money, 2),
    }


def _total(rows: Iterable[TaskCost]) -> Json:
    rows = list(rows)
    prices = [one.money for one in rows if one.money is not None]
    return {
        "task": "all",
        "name": "",
        "minutes": round(sum(one.seconds for one in rows) / 60, 1),
        "workers": "",
        "GPU-hours": round(sum(one.gpu_hours for one in rows), 3),
        "token positions": sum(one.positions or 0 for one in rows),
        "money": round(sum(prices), 2) if prices else "",
    }
