"""An evaluation as an actor on the cluster."""

from typing import Any

import ray

from vila_ops.cluster import connect, log_to_driver
from vila_ops.eval.job import EvalJob


def run_on_ray(job: EvalJob) -> dict[str, Any]:
    """The report, made by an actor with one worker's share of the cluster."""
    connect(job.resources)
    actor = Evaluator.options(  # type: ignore[attr-defined]
        num_cpus=job.resources.evaluate.cpus_per_worker, num_gpus=job.resources.evaluate.gpus_per_worker
    ).remote()
    result: dict[str, Any] = ray.get(actor.run.remote(job.model_dump_json()))
    ray.kill(actor)
    return result


@ray.remote
class Evaluator:
    """One process that evaluates."""

    def run(self, job: str) -> dict[str, Any]:
        """The report of a job in JSON."""
        from vila_ops.eval.work import run  # heavy, and only needed here

        log_to_driver()
        return run(EvalJob.model_validate_json(job))
