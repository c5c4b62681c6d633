"""Train a stage with workers on a Ray cluster. Ray Train starts and restarts them; their loop is the same as inline."""

import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from vila_ops import tracing
from vila_ops.cluster import connect, device_on, gpu_label, log_to_driver, take_own_gpu, whoami
from vila_ops.config import Resources
from vila_ops.device import collectives
from vila_ops.errors import ClusterFull, DeviceLost, HungStep, RemoteError, WorkerLost, is_final
from vila_ops.train.job import RankInfo, TrainJob

START_TRY_SECONDS = float(os.environ.get("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "60"))
"""How long one try of Ray Train to start all workers waits for enough free nodes."""


def train_on_ray(job: TrainJob) -> list[dict[str, Any]]:
    """Train with `num_workers` workers and return the facts of each rank, in rank order.

    Ray restarts all workers when one dies, at most `max_failures` times. The loop then resumes from its newest
    checkpoint. Weights never pass through Ray: rank 0 writes them into the attempt's folder.

    Raises a worker's own error instead of Ray's report of it: a final error at once, DeviceLost at the second loss, and
    another error when no restart is left. Raises HungStep if a step hung, and ClusterFull if the cluster cannot start
    all workers.
    """
    connect(job.resources)
    job = job.with_changes({"resources.device": device_on(job.resources, job.resources.device)})
    started = time.time()
    try:
        _trainer(job).fit()
    except WorkerGroupError as error:
        _raise_final(job, error)
        _raise_cause(job, error, since=started)
        raise
    except ControllerError as error:
        if not isinstance(error.controller_failure, WorkerGroupStartupTimeoutError):
            raise
        raise ClusterFull(_too_few_nodes(job.resources)) from error
    finally:
        shutil.rmtree(job.ray_train(), ignore_errors=True)  # files of killed attempts too
    _raise_final(job)
    paths = [Path(f"{job.attempt}-rank-{rank}.json") for rank in range(job.resources.train.num_workers)]
    facts = [json.loads(path.read_text()) for path in paths]
    for path in paths:
        path.unlink()
    return facts


def _trainer(job: TrainJob) -> TorchTrainer:
    resources = job.resources
    return TorchTrainer(
        _worker,
        train_loop_config={"job": job.model_dump_json(), "working_directory": os.getcwd()},
        torch_config=TorchConfig(
            backend=collectives(resources.device),
            timeout_s=math.ceil(resources.train.network.timeout_seconds),
        ),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]  # mypy sees the class of Ray Train version 1
            num_workers=resources.train.num_workers,
            use_gpu=resources.device != "cpu",
            resources_per_worker={"CPU": resources.train.cpus_per_worker},
            label_selector=gpu_label(resources, resources.device) or None,
            placement_strategy=resources.train.placement,
        ),
        run_config=RunConfig(  # type: ignore[call-arg]
            name=Path(job.attempt).name,
            storage_path=str(job.ray_train()),
            failure_config=FailureConfig(  # type: ignore[call-arg]
                max_failures=resources.train.max_failures,
                controller_failure_limit=math.ceil(resources.train.start_timeout_seconds / START_TRY_SECONDS) - 1,
            ),
            worker_runtime_env={"env_vars": network_variables(resources)},
        ),
    )


def network_variables(resources: Resources) -> dict[str, str]:
    """The environment variables that every worker starts with, before it joins the process group."""
    interface = resources.train.network.interface
    interfaces = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface} if interface else {}
    return interfaces | resources.train.network.env


def _too_few_nodes(resources: Resources) -> str:
    """The message for a cluster that cannot start all workers."""
    train = resources.train
    each = {"CPU": train.cpus_per_worker, "GPU": int(resources.device != "cpu")}
    alive = [one["Resources"] for one in ray.nodes() if one["Alive"]]  # type: ignore[no-untyped-call]
    nodes = [{kind: one.get(kind, 0) for kind in each} for one in alive]
    label = gpu_label(resources, resources.device) or "any"
    return (
        f"{train.num_workers} workers of {each} with placement {train.placement} and node label {label} "
        f"did not start within {train.start_timeout_seconds:.0f} s; the live nodes have {nodes}. Add nodes and run "
        f"again, or change num_workers, cpus_per_worker, device or placement"
    )


def _raise_final(job: TrainJob, report: WorkerGroupError | None = None) -> None:
    """Raise the final error that a worker recorded, if there is one."""
    path = _error_file(job)
    if path.exists():
        error = RemoteError.from_json(path.read_text())
        path.unlink()
        raise error.rebuilt() from report


def _raise_cause(job: TrainJob, report: WorkerGroupError, *, since: float) -> None:
    """Raise a worker's OSError, or HungStep if a step hung after `since`, in seconds since 1970."""
    for failure in report.worker_failures.values():
        if isinstance(failure, OSError):
            raise failure from report
    if stacks := [str(path) for path in job.diagnostics().glob("*.stacks") if path.stat().st_mtime > since]:
        raise HungStep(
            f"stage {job.stage.name!r} failed in each of {job.resources.train.max_failures + 1} tries, and a step "
            f"hung; the stacks of its threads are in {', '.join(sorted(stacks))}; resources.train.watchdog sets when a "
            f"step counts as hung"
        ) from report


def _error_file(job: TrainJob) -> Path:
    return Path(f"{job.attempt}-failed.json")


def _worker(config: dict[str, str]) -> None:
    """Run the training loop as one of the workers, and leave its facts beside the attempt's folder."""
    from vila_ops.train.loop import train  # heavy, and only the worker needs it

    log_to_driver()
    take_own_gpu()
    if os.path.isdir(config["working_directory"]):  # relative paths refer to it; Ray Train changes the folder
        os.chdir(config["working_directory"])
    job = TrainJob.model_validate_json(config["job"])
    context, started = ray.train.get_context(), time.time()
    rank_info = RankInfo(rank=context.get_world_rank(), world_size=context.get_world_size())
    if _error_file(job).exists():  # Ray Train restarts the workers after every error, so a restart has to do nothing
        return
    try:
        facts = {**train(job, rank_info), **whoami()}
        tracing.flush()  # Ray ends the process soon
    except Exception as error:
        if _group_ended(rank_info):
            raise WorkerLost("another worker was lost, and with it the process group of this one in a step") from error
        if is_final(error) and not (isinstance(error, DeviceLost) and _is_first_loss(job, before=started)):
            draft = Path(f"{job.attempt}-failed-{rank_info.rank}.draft")
            draft.write_text(RemoteError.of(error).to_json())
            draft.replace(_error_file(job))
        raise
    Path(f"{job.attempt}-rank-{rank_info.rank}.json").write_text(json.dumps(facts))


def _group_ended(rank_info: RankInfo) -> bool:
    """Whether Ray Train has ended the process group, as it does in every worker that is left when one was lost.

    What such a worker raises then depends on where it is: an AssertionError of DeepSpeed, a ValueError of torch.
    """
    return rank_info.world_size > 1 and not torch.distributed.is_initialized()


def _is_first_loss(job: TrainJob, *, before: float) -> bool:
    """Record that a device was lost, and return whether none was lost before a time, when this try began.

    Several ranks of one try may lose their devices together.
    """
    record = Path(job.ray_train()) / f"{Path(job.attempt).name}-device-lost"
    is_first = not record.exists() or record.stat().st_mtime >= before
    record.touch()
    return is_first
