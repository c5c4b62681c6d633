"""The tasks of a store: what runs, where, how far, and what it costs. Read from leases, whose holders say it."""

import time
from typing import Literal, get_args

from vila_ops.artifacts import leases
from vila_ops.artifacts.leases import LeasedTask
from vila_ops.artifacts.progress import ProgressRecord
from vila_ops.config import Config

State = Literal["running", "lost", "failed", "stopped", "done"]
"""lost: its process ended without a word. stopped: it was cancelled, interrupted or preempted."""
STATES: tuple[State, ...] = get_args(State)
RECENT_SECONDS = 24 * 3600.0
"""How long a task is shown after it ended."""


class WatchedTask(Config):
    """One attempt at a task."""

    state: State
    task: str
    name: str
    address: str
    """Key of its address in the store, or the id of its flow run."""
    host: str
    workers: int
    began: float
    """In seconds since 1970, as `advanced` is."""
    advanced: float
    """Time of the last progress."""
    seconds: float
    """How long it has worked; of a lost one, until its last progress."""
    seconds_left: float | None
    """At its mean pace since it began to count; None where nothing is counted yet."""
    done: float
    total: float | None
    unit: str
    cost: float | None
    """`seconds` at the price of its accelerators; None where no price is known."""
    metrics: dict[str, float]
    """Newest values by their names in MLflow."""


def watched(store: str, *, now: float | None = None) -> list[WatchedTask]:
    """The tasks that run, then those that ended within RECENT_SECONDS, the newest first. Raises what the store does."""
    at = time.time() if now is None else now
    seen = [_watched(one, at) for one in leases.tasks(store, since=at - RECENT_SECONDS)]
    return sorted(seen, key=lambda one: (STATES.index(one.state), -one.began))


def _watched(leased: LeasedTask, now: float) -> WatchedTask:
    progress, state = leased.progress, _state(leased)
    running = state == "running"
    seconds = max(0.0, (now if running else progress.advanced) - progress.began)
    price = progress.price_per_hour
    return WatchedTask(
        state=state,
        task=progress.task,
        name=progress.name,
        address=leased.at.partition("/")[2],
        host=progress.host,
        workers=progress.workers,
        began=progress.began,
        advanced=progress.advanced,
        seconds=seconds,
        seconds_left=_seconds_left(progress, now) if running else None,
        done=progress.done,
        total=progress.total,
        unit=progress.unit,
        cost=None if price is None else price * seconds / 3600,
        metrics=progress.metrics,
    )


def _seconds_left(progress: ProgressRecord, now: float) -> float | None:
    made = progress.done - progress.resumed
    if progress.total is None or progress.resumed_at is None or made <= 0:
        return None
    return max(0.0, now - progress.resumed_at) / made * (progress.total - progress.done)


def _state(leased: LeasedTask) -> State:
    if leased.record.released:
        return leased.record.outcome
    return "lost" if leased.lost else "running"
