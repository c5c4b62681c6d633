"""The task `train_stage`: one stage from its data and what it starts from. Light: the work is in `loop`."""

import logging
import os
import time
from importlib.util import find_spec
from typing import Any

from vila_ops import tracking
from vila_ops.artifacts import store
from vila_ops.artifacts.execution import execution
from vila_ops.artifacts.kinds import Checkpoint, Dataset, Pretrained
from vila_ops.artifacts.leases import hold
from vila_ops.cluster import whoami
from vila_ops.config import NO_CONTEXT, Model, Resources, RunContext, Stage
from vila_ops.config.train import Lora
from vila_ops.model.projectors import plugin_of
from vila_ops.train.checkpoint.storage import remove_all
from vila_ops.train.job import JobPayload, RankInfo, StageInputs, TrainJob

REVISION = 5
log = logging.getLogger(__name__)


def train_stage(
    stage: Stage,
    model: Model,
    data: Dataset,
    init: Checkpoint | Pretrained,
    resources: Resources,
    context: RunContext = NO_CONTEXT,
) -> Checkpoint:
    """The model after a stage; trained only if the store has it not yet, and from its last resume checkpoint on.

    Raises NonFiniteLoss, CorruptArtifact, and ValueError for settings that do not fit together.
    """
    asked = StageInputs(
        stage=stage, model=model, data=data, init=init, resources=resources.for_stage(stage.name), context=context
    )
    _check_quantised(stage)
    fresh = isinstance(init, Pretrained) and model.weights is None
    recipe = {"stage": _own(stage), "projector": model.projector.model_dump(mode="json"), "fresh_projector": fresh}
    if plugin := plugin_of(model.projector.kind):
        recipe["projector_plugin"] = plugin
    at = store.address(Checkpoint, revision=REVISION, recipe=recipe, parents=(data.digest, init.digest))
    if done := store.find(Checkpoint, at, store=resources.storage.store):
        return done
    if resources.launch == "ray_job":
        return _as_job(at, asked)
    with hold(at, store=resources.storage.store):
        return store.find(Checkpoint, at, store=resources.storage.store) or _train(at, asked, fresh=fresh)


def _train(at: store.Address, asked: StageInputs, *, fresh: bool) -> Checkpoint:
    stage, data, init, resources = asked.stage, asked.data, asked.init, asked.resources
    for parent in (data, init):
        store.verify(parent)
    started = time.monotonic()
    attempt = store.begin(at, store=resources.storage.store)
    resume = f"{store.root_of(resources.storage.store)}/resume/{at.key}"
    run_id = tracking.start_run(
        resources, stage.name, parent=asked.context.parent_run, params=stage.model_dump(mode="json"),
        tags={"task": "train_stage", "stage": stage.name, "address": at.key, "data": data.digest, "init": init.digest},
    )  # fmt: skip
    tracking.log_input(resources, run_id, data, name=stage.mixture.name, context="train")
    job = TrainJob(
        stage=stage,
        data=data,
        init=init,
        resources=resources,
        context=asked.context,
        attempt=str(attempt),
        resume=resume,
        run_id=run_id,
        fresh_projector=fresh,
    )
    failed = True
    try:
        ran = _launch(job)
        failed = False
    finally:
        tracking.end_run(resources, run_id, failed=failed)
    checkpoint = store.seal(
        Checkpoint,
        at,
        attempt,
        facts={"stage": stage.name, "step": ran[0]["steps"]},
        execution=execution(launch=resources.launch, seconds=time.monotonic() - started, ran=ran)
        | {"mlflow_run": run_id},
    )
    remove_all(resume)
    log.info("trained %s: %s", stage.name, checkpoint.digest[:12])
    return checkpoint


def _check_quantised(stage: Stage) -> None:
    """Refuse 4-bit weights before any work where their library is missing."""
    if isinstance(stage.tuning, Lora) and stage.tuning.quantise and find_spec("bitsandbytes") is None:
        raise ValueError(
            f"stage {stage.name!r} has tuning.quantise {stage.tuning.quantise}, which needs bitsandbytes; "
            f"pip install 'vila-ops[qlora]', or set tuning.quantise to null"
        )


def _as_job(at: store.Address, asked: StageInputs) -> Checkpoint:
    """The checkpoint that a job of the cluster seals: the job is this task under launch `ray`."""
    from vila_ops.train.ray_job import train_as_job

    train_as_job(at.key, JobPayload.model_validate({**asked.model_dump(), "working_directory": os.getcwd()}))
    if done := store.find(Checkpoint, at, store=asked.resources.storage.store):
        return done
    raise RuntimeError(
        f"the job of {at.kind}/{at.key} has ended well, but {asked.resources.storage.store} here does not have it; "
        f"set a store that the cluster's head and this machine both see"
    )


def _launch(job: TrainJob) -> list[dict[str, Any]]:
    """Run the workers to their end; returns what each said of itself."""
    if job.resources.launch == "ray":
        from vila_ops.train.ray_workers import train_on_ray

        return train_on_ray(job)
    from vila_ops.train.loop import train

    return [{**train(job, RankInfo()), **whoami()}]


def _own(stage: Stage) -> dict[str, Any]:
    """The stage without its mixture, for which the data's digest stands, and without how often it saves."""
    return stage.model_dump(mode="json", exclude={"mixture", "save_every"})
