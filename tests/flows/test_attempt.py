"""What an attempt at a flow run asks Prefect, and how a signal ends it, without Prefect."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn
from uuid import UUID, uuid4

import httpx
import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.states import Cancelling, Running, State

from flows import attempt


@pytest.mark.parametrize("away", [0, 3])
@pytest.mark.parametrize(("state", "expected"), [(Cancelling(), True), (Running(), False)])
def test_a_busy_prefect_is_asked_again_whether_a_flow_run_was_cancelled(
    monkeypatch: pytest.MonkeyPatch, away: int, state: State[Any], expected: bool
) -> None:
    """A job on a cluster would go on where one unanswered question meant that its flow run was not cancelled."""
    flow_run, asked = uuid4(), []

    class Busy:
        def read_flow_run(self, which: UUID) -> FlowRun:
            asked.append(which)
            if len(asked) <= away:
                raise httpx.ReadTimeout("the database is locked")
            return FlowRun(id=which, flow_id=uuid4(), state=state)

    @contextlib.contextmanager
    def asking() -> Iterator[Busy]:
        yield Busy()

    monkeypatch.setattr(attempt, "_asking", asking)
    monkeypatch.setattr(attempt, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(attempt.runtime.flow_run, "id", str(flow_run), raising=False)
    assert attempt.cancelled() is expected
    assert asked == [flow_run] * (away + 1)


def test_without_a_flow_run_nothing_was_cancelled() -> None:
    assert not attempt.cancelled()


class Told(BaseException):
    """What the handler of SIGTERM raises, as that of Prefect does."""


@pytest.fixture
def _tells(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def tell(number: int, frame: FrameType | None) -> NoReturn:
        raise Told

    monkeypatch.setattr(attempt, "AGAIN_SECONDS", 0.05)
    before = signal.signal(signal.SIGTERM, tell)
    yield
    signal.signal(signal.SIGTERM, before)


def goes_on() -> NoReturn:
    """Work that only an exception ends in time."""
    threading.Event().wait(60)
    pytest.fail("no exception came")


@pytest.mark.usefixtures("_tells")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_a_destructor_swallows_comes_again() -> None:
    class Dies:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    def work() -> None:
        Dies()
        goes_on()

    with pytest.raises(Told), attempt._terminated_once():
        work()


@pytest.mark.usefixtures("_tells")
def test_a_signal_never_interrupts_the_import_system_which_holds_locks() -> None:
    """Such as between the acquisition of the global import lock and the `try` that releases it."""
    locked = []

    def imports() -> None:
        locked.append(True)
        signal.raise_signal(signal.SIGTERM)
        locked.clear()

    def work() -> None:
        imports()
        goes_on()

    imports.__code__ = imports.__code__.replace(co_filename="<frozen importlib._bootstrap>")
    with pytest.raises(Told), attempt._terminated_once():
        work()
    assert not locked


@pytest.mark.usefixtures("_tells")
def test_a_second_signal_does_not_interrupt_the_clean_up_after_the_first() -> None:
    cleaned = []

    def work() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            with contextlib.suppress(KeyError):
                raise KeyError
            for _ in range(3):
                signal.raise_signal(signal.SIGTERM)
            cleaned.append(True)

    with pytest.raises(Told), attempt._terminated_once():
        work()
    assert cleaned
    signal.raise_signal(signal.SIGTERM)  # it has ended: a late one changes nothing


class Prefect:
    """Says that a flow run is cancelled when it is asked for the second time."""

    def __init__(self) -> None:
        self.asked: list[UUID] = []

    def read_flow_run(self, which: UUID) -> FlowRun:
        self.asked.append(which)
        return FlowRun(id=which, flow_id=uuid4(), state=Cancelling() if len(self.asked) > 1 else Running())


@pytest.fixture
def prefect(monkeypatch: pytest.MonkeyPatch) -> Prefect:
    said = Prefect()

    @contextlib.contextmanager
    def asking() -> Iterator[Prefect]:
        yield said

    monkeypatch.setattr(attempt, "_asking", asking)
    return said


@pytest.mark.usefixtures("_tells")
def test_a_flow_run_that_someone_cancels_is_ended_once_prefect_says_so(
    prefect: Prefect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "POLL_SECONDS", 0.01)
    flow_run = uuid4()
    watchdog = attempt._CancelWatchdog(flow_run)

    def work() -> None:
        with watchdog:
            goes_on()

    with pytest.raises(Told):
        work()
    assert watchdog.cancelled
    assert prefect.asked == [flow_run, flow_run]


def test_prefect_is_not_asked_about_a_run_that_has_ended_by_then(prefect: Prefect) -> None:
    with attempt._CancelWatchdog(uuid4()) as watchdog:
        (thread,) = (one for one in threading.enumerate() if one.name == "cancellation")
    thread.join(60)
    assert not watchdog.cancelled
    assert prefect.asked == []
