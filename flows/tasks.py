"""The tasks as Prefect tasks with names and retries. The store is the cache, so Prefect's result cache is off.

What another try may help is tried again after 5 s, 30 s, 2 minutes and twice 5 minutes, or somewhat later, drawn at
random. So a store or a server that is away for ten minutes fails no run, and many runs do not come back at once.
"""

import logging
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from prefect import Task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.exceptions import TerminationSignal
from prefect.utilities.annotations import opaque

from flows.attempt import cancelled, follow
from vila_ops.artifacts.kinds import Checkpoint, Dataset, Pretrained
from vila_ops.config import NO_CONTEXT, Model, Resources, RunContext, Stage
from vila_ops.data.preprocess.prepare import prepare
from vila_ops.errors import Preempted, PromotionRaceLost, VilaError, is_final
from vila_ops.eval.evaluate import evaluate
from vila_ops.model.assemble import assemble
from vila_ops.pipeline.stages import Tasks
from vila_ops.registry.register import register
from vila_ops.serve.deploy import deploy
from vila_ops.train.stage import job_of, stop_job, trained
from vila_ops.train.stage import train_stage as train

DELAYS = (5.0, 30.0, 120.0, 300.0, 300.0)
"""Seconds before each retry, at the least."""
JITTER = 0.5
"""The largest share of a delay that is added to it."""
P = ParamSpec("P")
R = TypeVar("R")
log = logging.getLogger("vila_ops.flows")
"""Below `vila_ops`, whose lines Prefect keeps with the flow run."""


def retry_may_help(_task: Task[..., Any], _run: TaskRun, failed: State[Any]) -> bool:
    """Whether Prefect runs a failed task again: not for an error that would be the same, see `vila_ops.errors`.

    A lost promotion race would be, as the task keeps its arguments: `pipeline.promotion` brings another report. Where
    this process is preempted, only another one can go on.
    """
    error = failed.data
    return not (
        isinstance(error, PromotionRaceLost | Preempted) or (isinstance(error, BaseException) and is_final(error))
    )


class OpaqueTask(Task[P, R]):
    """A task of Prefect, which looks at whose results the arguments are, but not at each setting in them."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it in this process."""
        call: Callable[..., Any] = super().__call__
        return call(*map(opaque, args), **{key: opaque(value) for key, value in kwargs.items()})


def _task(function: Callable[P, R], *, name: str | None = None, retries: int = len(DELAYS)) -> Task[P, R]:
    return OpaqueTask(
        function,
        task_run_name=name,
        retries=retries,
        retry_delay_seconds=list(DELAYS[:retries]),
        retry_jitter_factor=JITTER,
        retry_condition_fn=retry_may_help,
        cache_policy=NO_CACHE,
    )


def train_stage(
    stage: Stage,
    model: Model,
    data: Dataset,
    init: Checkpoint | Pretrained,
    resources: Resources,
    context: RunContext = NO_CONTEXT,
) -> Checkpoint:
    """The task of that name. The flow run names its job, which a sealed stage has not."""
    job = job_of(stage, model, data, init, resources)
    if job is not None and trained(stage, model, data, init, resources) is None:
        follow(job)
    return train(stage, model, data, init, resources, context)


_train_stage = _task(train_stage, name="train {stage.name}")


def train_or_stop(
    stage: Stage,
    model: Model,
    data: Dataset,
    init: Checkpoint | Pretrained,
    resources: Resources,
    context: RunContext = NO_CONTEXT,
) -> Checkpoint:
    """The task `train_stage`. A job on a cluster outlives this process, unless someone cancels the flow run.

    The signal is caught outside of Prefect's task, as it may come while Prefect waits before another try.
    """
    try:
        return _train_stage(stage, model, data, init, resources, context)
    except TerminationSignal:
        if (job := job_of(stage, model, data, init, resources)) is not None and cancelled():
            try:
                stop_job(job)
            except (VilaError, ValueError) as error:
                log.error("the job of stage %s was not stopped: %s", stage.name, error)
        raise


TASKS = Tasks(
    assemble=_task(assemble),
    prepare=_task(prepare, name="prepare {mixture.name}"),
    train_stage=train_or_stop,
    evaluate=_task(evaluate, name="evaluate on {suite.name}"),
    register=_task(register),
    deploy=_task(deploy, retries=1),
)
