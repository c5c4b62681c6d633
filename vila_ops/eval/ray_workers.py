"""An evaluation as an actor on the cluster."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import ray

from vila_ops.cluster import connect, device_on, gpu_options, log_to_driver
from vila_ops.eval.job import EvalJob


@contextmanager
def session_on_ray(job: EvalJob) -> Iterator[Callable[[str], dict[str, Any]]]:
    """As `runner.session`, in an actor on the cluster."""
    connect(job.resources)
    device = device_on(job.resources, job.resources.device)
    options = {"num_cpus": job.resources.evaluate.cpus_per_worker, **gpu_options(job.resources, device)}
    own = job.with_changes({"resources.device": device})
    actor = Evaluator.options(**options).remote(own.model_dump_json())  # type: ignore[attr-defined]

    def measure(name: str) -> dict[str, Any]:
        ran: dict[str, Any] = ray.get(actor.measure.remote(name))
        return ran

    try:
        yield measure
    finally:
        ray.kill(actor)  # also after an error, whose traceback would keep the actor and its GPU


@ray.remote
class Evaluator:
    """One evaluating process."""

    def __init__(self, job: str) -> None:
        """The job is given as JSON; the model is loaded with the first benchmark, so that its errors are raised."""
        log_to_driver()
        self._job, self._session = EvalJob.model_validate_json(job), ExitStack()
        self._measure: Callable[[str], dict[str, Any]] | None = None

    def measure(self, name: str) -> dict[str, Any]:
        """Measure and seal a benchmark; returns which process did it."""
        from vila_ops.eval.runner import session  # heavy: torch, transformers

        if self._measure is None:
            self._measure = self._session.enter_context(session(self._job))
        return self._measure(name)
