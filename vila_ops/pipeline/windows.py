"""Windows of a schedule, each of which runs at most once: it is one create-only key, STORE/windows/<recipe>/<start>.

Prefect keeps what it could not start and runs all of it later, the oldest first, and two schedules may be due in one
window. So a scheduled run asks here first, and ends where it has nothing to do. All times are compared in UTC, so that
daylight saving moves no window.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from pydantic import ValidationError

from vila_ops.artifacts.store import backend, probe, root_of
from vila_ops.config import Config
from vila_ops.config.schedule import Schedule
from vila_ops.errors import CorruptArtifact

ORIGIN = datetime(1970, 1, 5, tzinfo=UTC)
"""Start of a window of any length. A Monday."""


@dataclass(frozen=True)
class FlowRun:
    """A run that asks whether it may work."""

    id: str
    due: datetime
    ready: Callable[[], object] = lambda: None
    """Raises where the run could not work. It is asked before the run claims anything, so that another one may."""


class WindowClaim(Config):
    """The content of a window's key."""

    flow_run: str
    when: str
    """UTC, ISO 8601, by the clock of the process that wrote it."""


def window_of(time: datetime, schedule: Schedule) -> datetime:
    """The start of the window that a time lies in, in UTC. Raises ValueError for a time without a zone."""
    if time.tzinfo is None:
        raise ValueError(f"{time} has no time zone, so nobody knows when it is; give it one, such as UTC")
    length = 3600 * schedule.window_hours  # in numbers, as Prefect's times do not divide by a timedelta
    number = (time.timestamp() - ORIGIN.timestamp()) // length
    return ORIGIN + timedelta(seconds=number * length)


def begin(
    name: str, schedule: Schedule, run: FlowRun, *, store: str, now: Callable[[], datetime] = lambda: datetime.now(UTC)
) -> str | None:
    """Claim the window in which a run of a recipe was due: None where the run may work, else why it has to end.

    A run that asks again, after it was retried, still has its window. A run whose window another one has, also if that
    one failed, has to end, and so has one whose window ended too long ago. Raises what `probe` and `ready` raise, and
    CorruptArtifact for a damaged key.
    """
    probe(store)
    window, present = window_of(run.due, schedule), window_of(now(), schedule)
    behind = (present - window) // timedelta(hours=schedule.window_hours)
    if behind > schedule.catch_up:
        return (
            f"window {window.isoformat()} of {name} is {behind} before the present one; by the schedule a late run "
            f"may be for at most {schedule.catch_up} (catch_up)"
        )
    place = f"{root_of(store)}/windows/{name}/{window:%Y-%m-%dT%H%MZ}.json"
    why = claimed(place, run, now())
    return f"window {window.isoformat()} of {name} {why}" if why else None


def claimed(place: str, run: FlowRun, now: datetime) -> str | None:
    """Write a create-only key: None where it is this run's, else a phrase that says whose it is."""
    holder = _claim(place)
    if holder is not None and holder.flow_run != run.id:
        return f"belongs to run {holder.flow_run}, which began at {holder.when}"
    run.ready()
    claim = WindowClaim(flow_run=run.id, when=now.isoformat())
    if holder is not None or backend(place).create(place, claim.model_dump_json().encode()):
        return None
    return claimed(place, run, now)  # another run was faster


def _claim(place: str) -> WindowClaim | None:
    """The run that has a key; None where none has."""
    text = backend(place).read(place)
    if text is None:
        return None
    try:
        return WindowClaim.model_validate_json(text)
    except ValidationError as error:
        raise CorruptArtifact(
            f"{place} does not say which run has this window ({error}); remove it if none has, and run again"
        ) from error
