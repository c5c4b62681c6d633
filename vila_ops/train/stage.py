"""The task `train_stage`: train one stage from its data and an initial model.

This module is light. The work is in `loop.py`, which is imported when there is something to train.
"""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from vila_ops import tracing, tracking
from vila_ops.artifacts import attempts, store
from vila_ops.artifacts.execution import execution
from vila_ops.artifacts.kinds import Checkpoint, Dataset, Pretrained
from vila_ops.artifacts.leases import Lease, hold
from vila_ops.cluster import whoami
from vila_ops.config import NO_CONTEXT, Model, Resources, RunContext, Stage
from vila_ops.model.projectors import plugin_of
from vila_ops.train.checkpoint.storage import remove_all
from vila_ops.train.checkpoint.unfinished import resume_folders, write_label
from vila_ops.train.checks import check_inputs, check_quantised
from vila_ops.train.job import JobPayload, RankInfo, StageInputs, TrainJob
from vila_ops.train.progress import StageReport

REVISION = 8
PLACES = ("name", "path", "tokenizer")
"""Settings of a model that may be places in the file system."""
FROM_STORE = "from the store: "
"""Before a place that is recorded as it is seen from the store."""
log = logging.getLogger(__name__)


def train_stage(
    stage: Stage,
    model: Model,
    data: Dataset,
    init: Checkpoint | Pretrained,
    resources: Resources,
    context: RunContext = NO_CONTEXT,
) -> Checkpoint:
    """Return the model after a stage, from the store or by training it from its last resume checkpoint on.

    Raises NonFiniteLoss, CorruptArtifact, and ValueError for settings that do not fit together.
    """
    inputs = StageInputs(
        stage=stage, model=model, data=data, init=init, resources=resources.for_stage(stage.name), context=context
    )
    check_quantised(stage)
    at = address_of(inputs)
    if done := store.find(Checkpoint, at, store=resources.storage.store):
        remove_all(resume_of(at, resources))  # a process that was killed after it sealed left them
        if resources.train.profile_steps:
            log.warning("stage %s is not profiled, as it was trained before: %s", stage.name, done.uri)
        return done
    if resources.launch == "ray_job":
        return _train_as_job(at, inputs)
    with hold(at, store=resources.storage.store) as lease:
        return store.find(Checkpoint, at, store=resources.storage.store) or _train_here(at, inputs, lease)


def address_of(inputs: StageInputs) -> store.Address:
    """Where the model after a stage is."""
    recipe = {
        "stage": _recipe_part(inputs.stage),
        "projector": inputs.model.projector.model_dump(mode="json"),
        "fresh_projector": _is_fresh(inputs),
    }
    if plugin := plugin_of(inputs.model.projector.kind):
        recipe["projector_plugin"] = plugin
    parents = (inputs.data.digest, inputs.init.digest)
    return store.address(Checkpoint, revision=REVISION, recipe=recipe, parents=parents)


def _is_fresh(inputs: StageInputs) -> bool:
    """Whether the projector has random weights, as no stage has trained it yet."""
    return isinstance(inputs.init, Pretrained) and inputs.model.weights is None


def trained(
    stage: Stage, model: Model, data: Dataset, init: Checkpoint | Pretrained, resources: Resources
) -> Checkpoint | None:
    """The model after a stage; None where it was not trained yet. Nothing is made."""
    inputs = StageInputs(stage=stage, model=model, data=data, init=init, resources=resources)
    return store.find(Checkpoint, address_of(inputs), store=resources.storage.store)


def trained_model(checkpoint: Checkpoint) -> Model:
    """The settings of the model that a stage trained, by which it reads text and images.

    Raises ValueError for a checkpoint that does not record them.
    """
    settings = store.manifest_of(checkpoint)["execution"].get("model")
    if settings is None:
        raise ValueError(
            f"{checkpoint.uri} does not say how the model reads text and images: it was trained by an earlier version "
            f"of vila-ops, or on S3 from folders of one machine; where it is the champion, remove it with `vila-ops "
            f"champion NAME --remove`, so that the next model that passes the gate becomes champion"
        )
    root = checkpoint.uri.rsplit("/", 2)[0]  # ROOT/checkpoint/ADDRESS

    def place(stated: str) -> str:
        seen = stated.removeprefix(FROM_STORE)
        return stated if seen == stated else os.path.normpath(f"{root}/{seen}")

    return Model.model_validate(_with_places(settings, place))


def _with_places(settings: dict[str, Any], place: Callable[[str], str]) -> dict[str, Any]:
    """The settings of a model, its places in the file system as `place` writes them."""

    def written(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return _with_places(value, place)
        return place(value) if key in PLACES and isinstance(value, str) else value

    return {key: written(key, value) for key, value in settings.items()}


def _recorded(model: Model, root: str) -> dict[str, Any] | None:
    """A model's settings for `trained_model`; None where a store on S3 would have to name a folder of this machine.

    Nothing sealed names an absolute place, so absolute places are recorded as they are seen from the store at `root`.
    """
    absolute: list[str] = []

    def place(stated: str) -> str:
        if not Path(stated).is_absolute():
            return stated
        absolute.append(stated)
        return f"{FROM_STORE}{os.path.relpath(stated, root)}"

    settings = _with_places(model.model_dump(mode="json"), place)
    return None if absolute and "://" in root else settings


def _train_here(at: store.Address, inputs: StageInputs, lease: Lease) -> Checkpoint:
    """Train and seal, while the lease is held."""
    stage, data, init, resources = inputs.stage, inputs.data, inputs.init, inputs.resources
    check_inputs(inputs)
    for parent in (data, init):
        store.content(parent)  # every byte is compared before anything is trained
    started = time.monotonic()
    resume = resume_of(at, resources)
    write_label(resume, stage.name)
    _tell_of_others(at, inputs)
    tags = {"task": "train_stage", "stage": stage.name, "data": data.digest, "init": init.digest}
    with tracking.open_run(
        resources, stage.name, key=("address", at.key), parent=inputs.context.parent_run,
        params=stage.model_dump(mode="json"), tags=tags,
    ) as run_id:  # fmt: skip
        tracking.log_input(resources, run_id, data, name=stage.mixture.name, context="train")
        ids: dict[str, str | int | None] = {"stage": stage.name, "address": at.key, "mlflow_run": run_id}
        with (
            tracing.work("train_stage", stage.name, parent=inputs.context.trace, **ids),
            attempts.attempt(at, store=resources.storage.store, lease=lease) as attempt,
        ):
            job = TrainJob(
                stage=stage,
                data=data,
                init=init,
                resources=resources,
                context=inputs.context.with_changes({"trace": tracing.carried()}),
                attempt=str(attempt),
                resume=resume,
                run_id=run_id,
                fresh_projector=_is_fresh(inputs),
            )
            lease.report = report = StageReport(stage, resources, job.diagnostics())
            workers = _run_workers(job)
            report.end(workers[0]["steps"])
    checkpoint = store.seal(
        Checkpoint,
        at,
        attempt,
        facts={"stage": stage.name, "step": workers[0]["steps"]},
        execution=execution(launch=resources.launch, seconds=time.monotonic() - started, ran=workers)
        | {"mlflow_run": run_id, "model": _recorded(inputs.model, store.root_of(resources.storage.store))},
    )
    remove_all(resume)
    log.info("trained %s: %s", stage.name, checkpoint.digest[:12])
    return checkpoint


def resume_of(at: store.Address, resources: Resources) -> str:
    """The place of the stage's resume checkpoints."""
    return f"{store.root_of(resources.storage.store)}/resume/{at.key}"


def _tell_of_others(at: store.Address, inputs: StageInputs) -> None:
    """Log the resume checkpoints of this stage with other settings or data: nothing but `vila-ops gc` removes them."""
    for one in resume_folders(inputs.resources.storage.store):
        if one.stage == inputs.stage.name and one.address != at.key and one.step is not None and not one.sealed:
            log.info(
                "%s holds %.1f GB of stage %s with other settings or data, last saved %.1f days ago after step %s; "
                "`vila-ops gc` lists and removes such folders",
                one.place, one.num_bytes / 1e9, one.stage, (time.time() - one.changed) / 86400, one.step,
            )  # fmt: skip


def _train_as_job(at: store.Address, inputs: StageInputs) -> Checkpoint:
    """Return the checkpoint that a Ray job seals. The job is this task under launch `ray`."""
    from vila_ops.train.ray_job import train_as_job

    traced = inputs.with_changes({"context.trace": tracing.carried()})
    train_as_job(at.key, JobPayload.model_validate({**traced.model_dump(), "working_directory": os.getcwd()}))
    if done := store.find(Checkpoint, at, store=inputs.resources.storage.store):
        return done
    raise ValueError(
        f"the job of {at.kind}/{at.key} succeeded, but {inputs.resources.storage.store} on this machine does not have "
        f"its checkpoint; set a store that the cluster's head and this machine both see"
    )


class FollowedJob(NamedTuple):
    """What finds the jobs on a cluster that train a stage."""

    key: str
    server: str


def job_of(
    stage: Stage, model: Model, data: Dataset, init: Checkpoint | Pretrained, resources: Resources
) -> FollowedJob | None:
    """The job that trains a stage with launch `ray_job`; None with another launch."""
    own = resources.for_stage(stage.name)
    if own.job_address is None:
        return None
    inputs = StageInputs(stage=stage, model=model, data=data, init=init, resources=own)
    return FollowedJob(address_of(inputs).key, own.job_address)


def stop_job(job: FollowedJob) -> None:
    """End a job; its resume checkpoints stay. Raises ClusterUnreachable, and ValueError where a token is missing."""
    from vila_ops.train import ray_job  # heavy: ray

    ray_job.stop_job(job.key, job.server)


def _run_workers(job: TrainJob) -> list[dict[str, Any]]:
    """Train with one worker in this process or with several on Ray. Returns the facts of each rank, in rank order."""
    if job.resources.launch == "ray":
        from vila_ops.train.ray_workers import train_on_ray

        return train_on_ray(job)
    from vila_ops.train.loop import train

    return [{**train(job, RankInfo()), **whoami()}]


def _recipe_part(stage: Stage) -> dict[str, Any]:
    """The part of the stage that enters the address.

    The mixture is left out, as the data's digest stands for it, and so is `save_every`, which changes no weight.
    """
    return stage.model_dump(mode="json", exclude={"mixture", "save_every"})
