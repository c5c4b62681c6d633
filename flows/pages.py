"""What a flow run shows on its page in Prefect: progress, why each task runs, and what came out.

A thread writes it, in order, while the run works: Prefect answers each write later than an unchanged task ends.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from contextvars import copy_context
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from vila_ops.ahead import Workers
from vila_ops.pipeline.explain import Step
from vila_ops.pipeline.stages import Tasks
from vila_ops.report import cost, summary

TELL_SECONDS = 1.0
"""Shortest time between two updates: the tasks of an unchanged run take milliseconds."""
FAILED_SECONDS = 5.0
"""How long a run that failed waits for its page."""
P = ParamSpec("P")
R = TypeVar("R")


class FlowPage:
    """The page of this flow run."""

    def __init__(self, writer: Workers) -> None:
        self._writer, self._written = writer, list[Future[Any]]()

    def write(self, what: Callable[..., Any], **given: Any) -> Future[Any]:
        """Write a part after those before it. The result of the future is what Prefect's call returns."""
        future = self._writer.submit(partial(copy_context().run, partial(what, **given)))
        self._written.append(future)
        return future

    def wait(self, *, seconds: float | None = None) -> None:
        """Wait until all is written, or for some seconds. Raises what Prefect raised."""
        for one in wait(self._written, timeout=seconds).done:
            one.result()

    def show_plan(self, steps: Sequence[Step]) -> None:
        """Why each task runs, or that its result is sealed."""
        rows = [{"task": s.task, "name": s.name, "status": s.status, "why": "; ".join(s.why)} for s in steps]
        self._table("vila-plan", rows, "Why this runs, and why that does not")

    def show_outcome(self, told: summary.Json) -> None:
        """The run in a few lines, its stages, the models beside each other, and what it cost."""
        self.write(create_markdown_artifact, key="vila-report", markdown=summary.markdown(told), description="The run")
        self._table("vila-stages", summary.table(told), "The stages")
        self._table("vila-models", summary.models_table(told), "The models by their scores")
        self._table("vila-cost", cost.table(told["cost"]), "What the tasks took")

    def _table(self, key: str, rows: list[summary.Json], description: str) -> None:
        self.write(create_table_artifact, key=key, table=rows, description=description)


@contextmanager
def opened() -> Iterator[FlowPage]:
    """The page of this flow run. Where the body ends, all of it is written."""
    with Workers(1, name="page") as writer:
        page = FlowPage(writer)
        try:
            yield page
        except Exception:
            with suppress(Exception):  # the first error is the one to tell
                page.wait(seconds=FAILED_SECONDS)
            raise
        page.wait()


class TaskProgress:
    """The share of a run's tasks that have ended."""

    def __init__(self, page: FlowPage, steps: Sequence[Step]) -> None:
        self._page, self._total, self._done, self._told = page, len(steps), 0, time.monotonic()
        described = f"{self._total} tasks: {sum(step.status == 'sealed' for step in steps)} are sealed and reused"
        self._artifact = page.write(create_progress_artifact, progress=0.0, key="vila-progress", description=described)

    def counting(self, tasks: Tasks) -> Tasks:
        """These tasks, each counted when it ends."""
        return Tasks(**{name: self._counted(task) for name, task in vars(tasks).items()})

    def close(self) -> None:
        """All tasks have ended."""
        self._done = self._total
        self._tell()

    def _tell(self) -> None:
        self._told = time.monotonic()
        self._page.write(self._update, progress=min(100.0, 100 * self._done / self._total))

    def _update(self, progress: float) -> None:
        update_progress_artifact(self._artifact.result(), progress=progress)

    def _counted(self, task: Callable[P, R]) -> Callable[P, R]:
        @wraps(task)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            result = task(*args, **kwargs)
            self._done += 1
            if self._told + TELL_SECONDS < time.monotonic():
                self._tell()
            return result

        return call
