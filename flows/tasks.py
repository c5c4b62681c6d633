"""The tasks as Prefect tasks with names and retries. The store is the cache, so Prefect's result cache is off."""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun

from vila_ops.data.preprocess.prepare import prepare
from vila_ops.errors import PromotionRaceLost, is_final
from vila_ops.eval.evaluate import evaluate
from vila_ops.model.assemble import assemble
from vila_ops.pipeline.stages import Tasks
from vila_ops.registry.register import register
from vila_ops.serve.deploy import deploy
from vila_ops.train.stage import train_stage

P = ParamSpec("P")
R = TypeVar("R")


def retry_may_help(_task: Task[..., Any], _run: TaskRun, failed: State[Any]) -> bool:
    """Whether Prefect runs a failed task again: not for an error that would be the same, see `vila_ops.errors`.

    A lost promotion race would be, as the task keeps its arguments: `pipeline.promotion` brings another report.
    """
    error = failed.data
    return not (isinstance(error, PromotionRaceLost) or (isinstance(error, BaseException) and is_final(error)))


def _task(function: Callable[P, R], *, name: str | None = None, retries: int = 2) -> Task[P, R]:
    return task(
        task_run_name=name,
        retries=retries,
        retry_delay_seconds=5,
        retry_condition_fn=retry_may_help,
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
