"""What an attempt at a flow run asks Prefect, without one."""

import contextlib
from collections.abc import Iterator
from typing import Any
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
