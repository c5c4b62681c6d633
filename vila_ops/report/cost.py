"""What the sealed artifacts of a recipe took to make, as rows for people."""

from collections.abc import Iterable, Sequence
from typing import Any

from vila_ops.config import Run
from vila_ops.pipeline.cost import TaskCost, cost_of
from vila_ops.pipeline.explain import Step

Json = dict[str, Any]
JOULES_PER_WATT_HOUR = 3600
UNREADABLE = "not readable"


def costs_of(run: Run, steps: Iterable[Step]) -> tuple[list[TaskCost], int]:
    """What the sealed artifacts of a recipe took, in the order of a run, and how many more it would make."""
    making = [step for step in steps if step.status != "reconciles"]
    sealed = [cost_of(step.task, step.name, step.uri, run.resources) for step in making if step.uri is not None]
    return sealed, len(making) - len(sealed)


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
        "CPU Wh": _watt_hours([one.cpu_joules]) if one.positions else "",
        "GPU Wh": _watt_hours([one.gpu_joules]) if one.positions and one.gpu_hours else "",
    }


def _total(rows: Iterable[TaskCost]) -> Json:
    rows = list(rows)
    prices = [one.money for one in rows if one.money is not None]
    stages = [one for one in rows if one.positions]
    on_gpus = [one for one in stages if one.gpu_hours]
    return {
        "task": "all",
        "name": "",
        "minutes": round(sum(one.seconds for one in rows) / 60, 1),
        "workers": "",
        "GPU-hours": round(sum(one.gpu_hours for one in rows), 3),
        "token positions": sum(one.positions or 0 for one in rows),
        "money": round(sum(prices), 2) if prices else "",
        "CPU Wh": _watt_hours([one.cpu_joules for one in stages]),
        "GPU Wh": _watt_hours([one.gpu_joules for one in on_gpus]),
    }


def _watt_hours(joules: Sequence[float | None]) -> float | str:
    """Their sum; where one is not known, in words."""
    known = [one for one in joules if one is not None]
    if len(known) < len(joules):
        return UNREADABLE
    return round(sum(known) / JOULES_PER_WATT_HOUR, 2) if known else ""
