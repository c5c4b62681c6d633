"""How the page of a flow run is written beside its work, without Prefect."""

import threading
from contextvars import ContextVar
from typing import Any

import pytest

from flows import pages
from vila_ops.pipeline.explain import Step
from vila_ops.pipeline.stages import Tasks

ANYTHING: Any = object()
OWN = ContextVar[str]("own")


def test_the_work_does_not_wait_for_its_page_and_all_of_it_is_written_in_order() -> None:
    asked, answered, written = threading.Event(), threading.Event(), list[str]()

    def slow(part: str) -> str:
        asked.set()
        assert answered.wait(60)
        written.append(f"{part} of {OWN.get()}")
        return part

    token = OWN.set("this run")
    with pages.opened() as page:
        first = page.write(slow, part="plan")
        page.write(slow, part="outcome")
        assert asked.wait(60)
        assert written == []
        answered.set()
    OWN.reset(token)
    assert written == ["plan of this run", "outcome of this run"]
    assert first.result() == "plan"


@pytest.mark.parametrize("fails", [False, True])
def test_a_part_that_is_not_written_fails_a_run_that_has_no_error_of_its_own(*, fails: bool) -> None:
    """The rest is written in any case."""
    written = list[str]()

    def refused() -> None:
        raise ConnectionError("Prefect is away")

    def run() -> None:
        with pages.opened() as page:
            page.write(refused)
            page.write(lambda: written.append("the rest"))
            if fails:
                raise ValueError("no such folder")

    with pytest.raises(ValueError if fails else ConnectionError):
        run()
    assert written == ["the rest"]


def test_progress_counts_the_tasks_that_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    told = list[tuple[str, float]]()

    def created(*, progress: float, key: str, description: str) -> str:
        told.append((f"{key}: {description}", progress))
        return "its id"

    monkeypatch.setattr(pages, "create_progress_artifact", created)
    monkeypatch.setattr(pages, "update_progress_artifact", lambda which, progress: told.append((which, progress)))
    monkeypatch.setattr(pages, "TELL_SECONDS", -1.0)
    sealed = Step(task="assemble", name="base", status="sealed", why=(), uri=None)
    steps = [sealed, *[sealed.with_changes({"status": "runs"})] * 3]
    with pages.opened() as page:
        progress = pages.TaskProgress(page, steps)
        tasks = progress.counting(Tasks(assemble=lambda *_: ANYTHING))
        assert tasks.assemble(ANYTHING, ANYTHING, ANYTHING) is ANYTHING
        progress.close()
    begun = "vila-progress: 4 tasks: 1 are sealed and reused"
    assert told == [(begun, 0.0), ("its id", 25.0), ("its id", 100.0)]
