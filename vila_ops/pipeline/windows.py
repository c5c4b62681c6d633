"""Windows of a schedule, each of which runs at most once: it is one create-only key, STORE/windows/<recipe>/<start>.

Prefect keeps what it could not start and runs all of it later, the oldest first, and two schedules may be due in one
window. So a scheduled run asks here first, and ends where it has nothing to do. All times are compared in UTC, so that
daylight saving moves no window.
"""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from pydantic import ValidationError

from vila_ops.artifacts.store import backend, probe, root_of
from vila_ops.config import Config
from vila_ops.config.schedule import Schedule
from vila_ops.errors import CorruptArtifact

ORIGIN = datetime(1970, 1, 5, tzinfo=UTC)
"""Start of a window of any length. A Monday."""


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
    name: str,
    schedule: Schedule,
    *,
    due: datetime,
    flow_run: str,
    store: str,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> str | None:
    """Claim the window in which a run of a recipe was due: None where the run may work, else why it has to end.

    A run that asks again, after it was retried, still has its window. A run whose window another one has, also if that
    one failed, has to end, and so has one whose window ended too long ago. Raises what `probe` raises, and
    CorruptArtifact for a damaged key.
    """
    probe(store)
    window, present = window_of(due, schedule), window_of(now(), schedule)
    behind = (present - window) // timedelta(hours=schedule.window_hours)
    if behind > schedule.catch_up:
        return (
            f"window {window.isoformat()} of {name} is {behind} before the present one; by the schedule a late run "
            f"may be for at most {schedule.catch_up} (catch_up)"
        )
    place = f"{root_of(store)}/windows/{name}/{window:%Y-%m-%dT%H%MZ}.json"
    why = claimed(place, WindowClaim(flow_run=flow_run, when=now().isoformat()))
    return f"window {window.isoformat()} of {name} {why}" if why else None


def claimed(place: str, claim: WindowClaim) -> str | None:
    """Write a create-only key: None where it is this run's, else a phrase that says whose it is."""
    if backend(place).create(place, claim.model_dump_json().encode()):
        return None
    holder = _claim(place)
    if holder.flow_run == claim.flow_run:
        return None
    return f"belongs to run {holder.flow_run}, which began at {holder.when}"


def _claim(place: str) -> WindowClaim:
    try:
        return WindowClaim.model_validate_json(backend(place).read(place) or b"")
    except ValidationError as error:
        raise CorruptArtifact(
            f"{place} does not say which run has this window ({error}); remove it if none has, and run again"
        ) from error
