"""What a flow run shows on its page in Prefect: progress, why each task runs, and what came out."""

import time
from collections.abc import Callable, Sequence
from functools import wraps
from typing import ParamSpec, TypeVar
from uuid import UUID

from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from vila_ops.pipeline.explain import Step
from vila_ops.pipeline.stages import Tasks
from vila_ops.report import cost, summary

TELL_SECONDS = 1.0
"""Shortest time between two updates: the tasks of an unchanged run take milliseconds."""
P = ParamSpec("P")
R = TypeVar("R")


class TaskProgress:
    """The share of a run's tasks that have ended."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._total, self._done, self._told = len(steps), 0, time.monotonic()
        described = f"{self._total} tasks: {sum(step.status == 'sealed' for step in steps)} are sealed and reused"
        self._artifact = create_progress_artifact(progress=0.0, key="vila-progress", description=described)

    def counting(self, tasks: Tasks) -> Tasks:
        """These tasks, each counted when it ends."""
        return Tasks(**{name: self._counted(task) for name, task in vars(tasks).items()})

    def close(self) -> None:
        """All tasks have ended."""
        self._done = self._total
        self._tell()

    def _tell(self) -> None:
        self._told = time.monotonic()
        if isinstance(self._artifact, UUID):
            update_progress_artifact(self._artifact, progress=min(100.0, 100 * self._done / self._total))

    def _counted(self, task: Callable[P, R]) -> Callable[P, R]:
        @wraps(task)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            result = task(*args, **kwargs)
            self._done += 1
            if self._told + TELL_SECONDS < time.monotonic():
                self._tell()
            return result

        return call


def show_plan(steps: Sequence[Step]) -> None:
    """Why each task runs, or that its result is sealed."""
    rows = [{"task": s.task, "name": s.name, "status": s.status, "why": "; ".join(s.why)} for s in steps]
    create_table_artifact(key="vila-plan", table=rows, description="Why this runs, and why that does not")


def show_outcome(page: summary.Page) -> None:
    """The run in a few lines, its stages, the models beside each other, and what it cost."""
    told = page.summary
    create_markdown_artifact(key="vila-report", markdown=summary.markdown(told), description="The run")
    create_table_artifact(key="vila-stages", table=summary.table(told), description="The stages")
    create_table_artifact(key="vila-models", table=summary.models_table(told), description="The models by their scores")
    create_table_artifact(key="vila-cost", table=cost.table(told["cost"]), description="What the tasks took")
