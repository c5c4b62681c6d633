"""A stage's workers on the cluster: Ray Train starts, watches and restarts them; the loop is the same as inline."""

import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import ray.train
from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from vila_ops.cluster import connect, log_to_driver, whoami
from vila_ops.config import Resources
from vila_ops.train.job import FINAL, HungStep, RankInfo, RemoteError, TrainJob

TRY_SECONDS = float(os.environ.get("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "60"))
"""How long Ray Train waits for nodes with room for all workers before it asks for them anew."""


def train_on_ray(job: TrainJob) -> list[dict[str, Any]]:
    """Train with `num_workers` workers; returns what each of them said of itself.

    A worker that dies makes Ray restart the group, `max_failures` times at most; the loop then goes on from its
    newest resume checkpoint. Weights never pass through Ray: rank 0 writes them into the attempt's folder.
    Raises what a worker raised, where that says what is wrong, instead of Ray's report of it: one of FINAL at once,
    anything else when no restart is left, HungStep where a step hung in one of them, and
    TimeoutError where the cluster has no room for the workers.
    """
    connect(job.resources)
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
        raise TimeoutError(_no_room(job.resources)) from error
    finally:
        shutil.rmtree(job.ray_train(), ignore_errors=True)  # also what attempts left that were killed
    _raise_final(job)
    said = [Path(f"{job.attempt}-rank-{rank}.json") for rank in range(job.resources.train.num_workers)]
    ran = [json.loads(path.read_text()) for path in said]
    for path in said:
        path.unlink()
    return ran


def _trainer(job: TrainJob) -> TorchTrainer:
    resources = job.resources
    return TorchTrainer(
        _worker,
        train_loop_config={"job": job.model_dump_json(), "here": os.getcwd()},
        torch_config=TorchConfig(
            backend="nccl" if resources.train.gpus_per_worker else "gloo",
            timeout_s=math.ceil(resources.train.network.timeout_seconds),
        ),
        scaling_config=ScalingConfig(
            num_workers=resources.train.num_workers,
            use_gpu=bool(resources.train.gpus_per_worker),
            resources_per_worker={"CPU": resources.train.cpus_per_worker},
            placement_strategy=resources.train.placement,
        ),
        run_config=RunConfig(  # type: ignore[call-arg]  # mypy reads that of version 1, which is not what is imported
            name=Path(job.attempt).name,
            storage_path=str(job.ray_train()),
            failure_config=FailureConfig(  # type: ignore[call-arg]
                max_failures=resources.train.max_failures,
                controller_failure_limit=math.ceil(resources.train.start_timeout_seconds / TRY_SECONDS) - 1,
            ),
            worker_runtime_env={"env_vars": network_variables(resources)},
        ),
    )


def network_variables(resources: Resources) -> dict[str, str]:
    """What every worker has in its environment from its start on, before it meets the others."""
    interface = resources.train.network.interface
    own = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface} if interface else {}
    return own | resources.train.network.env


def _no_room(resources: Resources) -> str:
    train = resources.train
    each = {"CPU": train.cpus_per_worker, "GPU": train.gpus_per_worker}
    alive = [one["Resources"] for one in ray.nodes() if one["Alive"]]  # type: ignore[no-untyped-call]
    nodes = [{kind: one.get(kind, 0) for kind in each} for one in alive]
    return (
        f"no room for {train.num_workers} workers of {each} with placement {train.placement} within "
        f"{train.start_timeout_seconds:.0f} s; the nodes alive have {nodes}. Add nodes and ask again, or change "
        f"num_workers, cpus_per_worker or placement"
    )


def _raise_final(job: TrainJob, report: WorkerGroupError | None = None) -> None:
    """Raise the error of FINAL that a worker left behind."""
    failed = _failed(job)
    if failed.exists():
        told = RemoteError.model_validate_json(failed.read_text())
        failed.unlink()
        raise told.again() from report


def _raise_cause(job: TrainJob, report: WorkerGroupError, *, since: float) -> None:
    """Raise a worker's OSError, or HungStep where a step hung since then."""
    for failure in report.worker_failures.values():
        if isinstance(failure, OSError):
            raise failure from report
    if stacks := [str(path) for path in job.watch().glob("*.stacks") if path.stat().st_mtime > since]:
        raise HungStep(
            f"stage {job.stage.name!r} failed in each of {job.resources.train.max_failures + 1} tries, and a step "
            f"hung; where its threads stood: {', '.join(sorted(stacks))}; train.watchdog says what counts as hung"
        ) from report


def _failed(job: TrainJob) -> Path:
    return Path(f"{job.attempt}-failed.json")


def _worker(config: dict[str, str]) -> None:
    """One worker: the same loop as inline, in its place."""
    from vila_ops.train.loop import train  # heavy, and only needed here

    log_to_driver()
    if os.path.isdir(config["here"]):  # what is relative is so to the driver's folder; Ray Train has one of its own
        os.chdir(config["here"])
    job = TrainJob.model_validate_json(config["job"])
    context = ray.train.get_context()
    place = RankInfo(rank=context.get_world_rank(), world_size=context.get_world_size())
    if _failed(job).exists():  # Ray Train has no error that it does not retry: the restart that it insists on is empty
        return
    try:
        said = {**train(job, place), **whoami()}
    except FINAL as error:
        draft = Path(f"{job.attempt}-failed-{place.rank}.draft")
        draft.write_text(RemoteError.of(error).model_dump_json())
        draft.replace(_failed(job))
        raise
    Path(f"{job.attempt}-rank-{place.rank}.json").write_text(json.dumps(said))
