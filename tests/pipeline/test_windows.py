"""Each window of a schedule runs at most once, whatever happens to clocks, schedules and processes."""

import os
import random
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import NamedTuple
from zoneinfo import ZoneInfo

import pytest
import yaml

from tests.seed import SEED
from vila_ops.artifacts.store import backend
from vila_ops.config.schedule import Schedule
from vila_ops.errors import CorruptArtifact
from vila_ops.pipeline.windows import FlowRun, begin, window_of

ROOT = Path(__file__).parents[2]
HISTORIES = int(os.environ.get("VILA_HISTORIES", "100"))
ZONES = (UTC, ZoneInfo("Europe/Berlin"), ZoneInfo("America/New_York"), ZoneInfo("Australia/Lord_Howe"))
"""The last one moves its clocks by half an hour."""
CHANGES = (datetime(2026, 3, 29), datetime(2026, 11, 1), datetime(2026, 10, 4), datetime(2026, 12, 31))
"""Days near which clocks change in one of these zones, and the end of a year."""


class Arrival(NamedTuple):
    """A scheduled run that starts to work."""

    flow_run: str
    due: datetime
    clock: datetime
    """What the clock of its machine says."""


def week(time: datetime) -> tuple[int, ...]:
    """The window of a time by the calendar."""
    return time.astimezone(UTC).isocalendar()[:2]


def day(time: datetime) -> tuple[int, ...]:
    """The window of a time by the calendar."""
    here = time.astimezone(UTC)
    return here.year, here.month, here.day


def shift(time: datetime) -> tuple[int, ...]:
    """The window of a time by the calendar: a quarter of a day."""
    return (*day(time), time.astimezone(UTC).hour // 6)


CALENDARS = {168: week, 24: day, 6: shift}
"""By the hours of a window."""


def windows_between(first: datetime, last: datetime, hours: int) -> int:
    """How many windows later the second time lies, counted one by one by the calendar; 0 if it lies before."""
    count, at = 0, first.astimezone(UTC)
    calendar = CALENDARS[hours]
    while at < last and calendar(at) != calendar(last):
        at += timedelta(hours=hours)
        count += 1
    return count


def history(draw: random.Random, hours: int) -> list[Arrival]:
    """Runs that a schedule and a second one start in some days, as they arrive: late, in another order, twice."""
    zone, start = draw.choice(ZONES), draw.choice(CHANGES) - timedelta(days=draw.randint(0, 3))
    arrivals: list[Arrival] = []
    for turn in range(draw.randint(2, 7)):
        local = start + timedelta(hours=hours * turn + draw.choice((0, 0, 1, 2, 2.5)))
        folds = (0, 1) if draw.random() < 0.3 else (0,)  # both 02:30 of the day when clocks go back
        for copy, fold in enumerate(folds):
            due = local.replace(tzinfo=zone, fold=fold)
            late = draw.choice((0.0, 0.01, 1.0, hours / 2, hours * 1.5, hours * 4.0))  # a worker that was away
            jump = draw.choice((0.0, 0.0, 0.0, -1.0, 1.0, -hours * 3.0, hours * 3.0))  # a clock that is wrong
            clock = due.astimezone(UTC) + timedelta(hours=late + jump)
            one = Arrival(f"run-{turn}-{copy}", due, clock)
            arrivals += [one] * draw.choice((1, 1, 2))  # it is retried
            if draw.random() < 0.3:  # a schedule that overlaps
                arrivals.append(one._replace(flow_run=f"other-{turn}-{copy}", due=due + timedelta(minutes=5)))
    arrivals.sort(key=lambda one: one.due.astimezone(UTC))  # Prefect starts the oldest first
    for _ in range(draw.choice((0, 0, 3))):
        arrivals.insert(draw.randrange(len(arrivals)), arrivals.pop(draw.randrange(len(arrivals))))
    return arrivals


def test_each_window_runs_at_most_once_in_any_history(tmp_path: Path) -> None:
    """The model of a history: a window by the calendar belongs to the first run that came in time."""
    draw = random.Random(SEED)
    seen = {"began": 0, "late": 0, "taken": 0, "retried": 0}
    for number in range(HISTORIES):
        hours = draw.choice(list(CALENDARS))
        schedule = Schedule(window_hours=hours, catch_up=draw.choice((0, 0, 1, 3)))
        holders: dict[tuple[int, ...], str] = {}
        began = defaultdict(set)
        for flow_run, due, clock in history(draw, hours):
            window = CALENDARS[hours](due)
            name, store = f"recipe-{number}", str(tmp_path)
            why = begin(name, schedule, FlowRun(flow_run, due), store=store, now=lambda at=clock: at)
            if windows_between(due, clock, hours) > schedule.catch_up:
                assert why is not None
                assert "before the present one" in why
                seen["late"] += 1
                continue
            holder = holders.setdefault(window, flow_run)
            assert (why is None) == (holder == flow_run), (number, window, holder, flow_run, why)
            if why is None:
                seen["retried" if flow_run in began[window] else "began"] += 1
                began[window].add(flow_run)
            else:
                assert f"belongs to run {holder}" in why
                seen["taken"] += 1
        assert all(len(runs) == 1 for runs in began.values())
    assert min(seen.values()) >= HISTORIES // 10, seen


def test_of_runs_that_begin_at_once_one_has_the_window(store: str) -> None:
    due = datetime(2026, 11, 30, 3, tzinfo=UTC)

    def arrive(turn: int, run: int) -> bool:
        at = due + timedelta(weeks=turn)
        return begin("tiny", Schedule(), FlowRun(str(run), at), store=store, now=lambda: at) is None

    with ThreadPoolExecutor(4) as pool:
        for turn in range(10):
            assert sum(pool.map(lambda run, turn=turn: arrive(turn, run), range(4))) == 1


def test_a_run_that_could_not_work_leaves_its_window_to_another(store: str) -> None:
    """A run that finds its window taken is not asked."""
    due = datetime(2026, 11, 30, 3, tzinfo=UTC)

    def asked(flow_run: str, ready: Callable[[], object]) -> str | None:
        return begin("tiny", Schedule(), FlowRun(flow_run, due, ready), store=store, now=lambda: due)

    def refuse() -> None:
        raise ValueError("no GPU")

    with pytest.raises(ValueError, match="no GPU"):
        asked("1", refuse)
    assert asked("2", lambda: None) is None
    assert "belongs to run 2" in (asked("1", refuse) or "")
    with pytest.raises(ValueError, match="no GPU"):
        asked("2", refuse)


def test_a_window_begins_on_monday_in_utc_wherever_the_time_is_told() -> None:
    sunday = datetime(2026, 11, 29, 23, 30, tzinfo=timezone(timedelta(hours=-5)))  # Monday, 04:30 UTC
    assert window_of(sunday, Schedule()) == datetime(2026, 11, 30, tzinfo=UTC)
    assert window_of(datetime(1969, 12, 31, 23, tzinfo=UTC), Schedule()) == datetime(1969, 12, 29, tzinfo=UTC)
    with pytest.raises(ValueError, match="has no time zone"):
        window_of(datetime(2026, 11, 30), Schedule())


def test_a_key_that_says_nothing_is_named(store: str) -> None:
    due = datetime(2026, 11, 30, 3, tzinfo=UTC)
    place = f"{store}/windows/tiny/2026-11-30T0000Z.json"
    backend(store).create(place, b"{}")
    with pytest.raises(CorruptArtifact, match=f"{place} does not say which run has this window"):
        begin("tiny", Schedule(), FlowRun("1", due), store=store, now=lambda: due)


def test_shipped_schedules_are_in_utc_have_windows_and_no_limit_of_their_own() -> None:
    """A limit of a deployment cancels training when Prefect's server is away (prefect 3.8, flow_engine.py)."""
    for deployment in yaml.safe_load((ROOT / "infra/prefect.yaml").read_text())["deployments"]:
        assert "concurrency_limit" not in deployment
        for one in deployment.get("schedules", []):
            assert one["timezone"] == "UTC"
            if "trigger" not in one["parameters"]:  # retraining has its windows in a policy
                Schedule.model_validate(one["parameters"]["schedule"])
