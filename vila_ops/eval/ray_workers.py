"""An evaluation as an actor on the cluster."""

from typing import Any

import ray

from vila_ops.cluster import connect, log_to_driver
from vila_ops.eval.job import EvalJob


def run_on_ray(job: EvalJob) -> dict[str, Any]:
    """Measure and seal the benchmarks of a job in an actor on the cluster; returns which process did it."""
    connect(job.resources)
    actor = Evaluator.options(  # type: ignore[attr-defined]
        num_cpus=job.resources.evaluate.cpus_per_worker, num_gpus=job.resources.evaluate.gpus_per_worker
    ).remote()
    try:
        ran: dict[str, Any] = ray.get(actor.run.remote(job.model_dump_json()))
    finally:
        ray.kill(actor)  # also after an error, whose traceback would keep the actor and its GPU
    return ran


@ray.remote
class Evaluator:
    """One evaluating process."""

    def run(self, job: str) -> dict[str, Any]:
        """Run a job given as JSON."""
        from vila_ops.eval.runner import run  # heavy: torch, transformers

        log_to_driver()
        return run(EvalJob.model_validate_json(job))
