"""A stage's workers on the cluster: Ray Train starts, watches and restarts them; the loop is the same as inline."""

import json
from pathlib import Path
from typing import Any

import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer

from vila_ops.cluster import connect, log_to_driver, whoami
from vila_ops.train.job import Job, NonFiniteLoss, Place


def train_on_ray(job: Job) -> list[dict[str, Any]]:
    """Train with `num_workers` workers; returns what each of them said of itself.

    A worker that dies makes Ray restart the group, `max_failures` times at most; the loop then goes on from its
    newest resume checkpoint. Weights never pass through Ray: rank 0 writes them into the attempt's folder.
    Raises what a worker raised, where that says what is wrong, instead of Ray's report of it.
    """
    resources = job.resources
    connect(resources)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"job": job.model_dump_json()},
        torch_config=TorchConfig(backend="nccl" if resources.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=resources.num_workers,
            use_gpu=bool(resources.gpus_per_worker),
            resources_per_worker={"CPU": resources.cpus_per_worker},
        ),
        run_config=RunConfig(
            name=Path(job.attempt).name,
            storage_path=str(resources.scratch() / "ray_train"),
            failure_config=FailureConfig(max_failures=resources.max_failures),
        ),
    )
    try:
        trainer.fit()
    except WorkerGroupError as error:
        for failure in error.worker_failures.values():
            if isinstance(failure, ValueError | OSError | NonFiniteLoss):
                raise failure from error
        raise
    said = [Path(f"{job.attempt}-rank-{rank}.json") for rank in range(resources.num_workers)]
    ran = [json.loads(path.read_text()) for path in said]
    for path in said:
        path.unlink()
    return ran


def _worker(config: dict[str, str]) -> None:
    """One worker: the same loop as inline, in its place."""
    from vila_ops.train.loop import train  # heavy, and only needed here

    log_to_driver()
    job = Job.model_validate_json(config["job"])
    context = ray.train.get_context()
    place = Place(rank=context.get_world_rank(), world_size=context.get_world_size())
    said = {**train(job, place), **whoami()}
    Path(f"{job.attempt}-rank-{place.rank}.json").write_text(json.dumps(said))
