"""The tasks as Prefect tasks: retries and names, nothing else. The store is the cache, so Prefect's stays off."""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun

from vila_ops.data.preprocess.prepare import prepare
from vila_ops.eval.evaluate import evaluate
from vila_ops.model.assemble import assemble
from vila_ops.pipeline.stages import Tasks
from vila_ops.registry.register import register
from vila_ops.serve.deploy import deploy
from vila_ops.train.job import FINAL
from vila_ops.train.stage import train_stage

P = ParamSpec("P")
R = TypeVar("R")


def _a_retry_may_mend_it(_task: Task[..., Any], _run: TaskRun, failed: State[Any]) -> bool:
    """Not a wrong value, a corrupted file or a loss that is not a number: they are the same at the second try."""
    return not isinstance(failed.data, FINAL)


def _task(function: Callable[P, R], *, name: str | None = None, retries: int = 2) -> Task[P, R]:
    return task(
        task_run_name=name,
        retries=retries,
        retry_delay_seconds=5,
        retry_condition_fn=_a_retry_may_mend_it,
        cache_policy=NO_CACHE,
    )(function)


TASKS = Tasks(
    assemble=_task(assemble),
    prepare=_task(prepare, name="prepare {mixture.name}"),
    train_stage=_task(train_stage, name="train {stage.name}"),
    evaluate=_task(evaluate, name="evaluate on {suite.name}"),
    register=_task(register),
    deploy=_task(deploy, retries=1),
)
