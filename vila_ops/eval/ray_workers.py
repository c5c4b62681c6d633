"""The workers of an evaluation as actors on the nodes of a cluster, each with the model loaded.

Each actor takes the next shard. Where one dies or loses its device, its shard is given to another, and a new one takes
its place.
"""

import logging
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError

from vila_ops.cluster import connect, device_on, gpu_options, log_to_driver, take_own_gpu
from vila_ops.device import fault_of
from vila_ops.errors import DeviceLost, WorkerLost
from vila_ops.eval.job import EvalJob

MOST_DEATHS = 3
"""How many actors may die of one shard before the evaluation fails."""
log = logging.getLogger(__name__)


class RayWorkers:
    """As `runner.Runner`, with the shards of a benchmark on many actors."""

    def __init__(self, job: EvalJob) -> None:
        connect(job.resources)
        device = device_on(job.resources, job.resources.device)
        self._job, self._actors = job.with_changes({"resources.device": device}), list[Any]()

    def close(self) -> None:
        """End the actors; also after an error, whose traceback would keep them and their GPUs."""
        for actor in self._actors:
            ray.kill(actor)

    def plan(self, name: str) -> list[int]:
        """As `Runner.plan`."""
        sizes: list[int] = self._on_one("plan", name)
        return sizes

    def pending(self, name: str) -> list[int]:
        """As `Runner.pending`."""
        shards: list[int] = self._on_one("pending", name)
        return shards

    def conclude(self, name: str) -> dict[str, Any]:
        """As `Runner.conclude`."""
        ran: dict[str, Any] = self._on_one("conclude", name)
        return ran

    def answer_all(self, name: str, shards: Sequence[int]) -> Iterator[int]:
        """As `Runner.answer_all`, in the order in which shards are sealed. Raises WorkerLost.

        An actor takes part as soon as the cluster has started it, so one for which there is no space delays nothing.
        """
        waiting, deaths = deque(shards), Counter[int]()
        count = min(self._job.resources.evaluate.num_workers, len(shards))
        actors = [self._actor(number) for number in range(count)]
        running: dict[Any, tuple[Any, int | None]] = {actor.start.remote(): (actor, None) for actor in actors}
        while waiting or any(shard is not None for _, shard in running.values()):
            (done, *_), _ = ray.wait(list(running))
            actor, shard = running.pop(done)
            try:
                ray.get(done)
            except (RayActorError, DeviceLost) as error:
                deaths[-1 if shard is None else shard] += 1
                if max(deaths.values()) == MOST_DEATHS:
                    raise WorkerLost(f"{name!r}, shard {shard}: {MOST_DEATHS} actors died: {error}") from error
                log.warning("%s: an actor died in shard %s; another one takes its place: %s", name, shard, error)
                actor = self._replaced(actor)
                running[actor.start.remote()] = (actor, None)
                if shard is not None:
                    waiting.appendleft(shard)
                continue
            if waiting:
                following = waiting.popleft()
                running[actor.answer.remote(name, following)] = (actor, following)
            if shard is not None:
                yield shard

    def _on_one(self, method: str, name: str) -> Any:
        """The result of a method on the first actor, or on a new one where that died."""
        for attempt in range(1, MOST_DEATHS + 1):
            actor = self._actor(0)
            try:
                return ray.get(getattr(actor, method).remote(name))
            except (RayActorError, DeviceLost) as error:
                if attempt == MOST_DEATHS:
                    raise WorkerLost(f"{method} of {name!r} ended {MOST_DEATHS} actors: {error}") from error
                log.warning("%s: an actor died in %s, which another one repeats: %s", name, method, error)
                self._replaced(actor)
        raise AssertionError("the last attempt returns or raises")

    def _actor(self, number: int) -> Any:
        """One of the actors, which is started when it is first needed."""
        while len(self._actors) <= number:
            self._actors.append(self._started())
        return self._actors[number]

    def _replaced(self, dead: Any) -> Any:
        """A new actor in place of one that died or lost its device."""
        ray.kill(dead)
        place = self._actors.index(dead)
        self._actors[place] = self._started()
        return self._actors[place]

    def _started(self) -> Any:
        resources = self._job.resources
        options = {"num_cpus": resources.evaluate.cpus_per_worker, **gpu_options(resources, resources.device)}
        return Evaluator.options(**options).remote(self._job.model_dump_json())  # type: ignore[attr-defined]


@ray.remote
class Evaluator:
    """One evaluating process."""

    def __init__(self, job: str) -> None:
        """The job is given as JSON. Nothing is loaded yet, so that errors are raised by the method that needs it."""
        log_to_driver()
        self._job = job
        self._runner: Any = None

    def start(self) -> None:
        """Return as soon as the process runs."""

    def plan(self, name: str) -> list[int]:
        """As `Runner.plan`."""
        sizes: list[int] = self._run("plan", name)
        return sizes

    def pending(self, name: str) -> list[int]:
        """As `Runner.pending`."""
        shards: list[int] = self._run("pending", name)
        return shards

    def answer(self, name: str, shard: int) -> dict[str, Any]:
        """As `Runner.answer`."""
        ran: dict[str, Any] = self._run("answer", name, shard)
        return ran

    def conclude(self, name: str) -> dict[str, Any]:
        """As `Runner.conclude`."""
        ran: dict[str, Any] = self._run("conclude", name)
        return ran

    def _run(self, method: str, *arguments: Any) -> Any:
        """The result of a method of the runner. Raises DeviceLost, after which this process is of no use."""
        from vila_ops.eval.runner import Runner  # heavy: torch, transformers

        try:
            if self._runner is None:
                take_own_gpu()
                self._runner = Runner(EvalJob.model_validate_json(self._job))
            return getattr(self._runner, method)(*arguments)
        except RuntimeError as error:
            if fault_of(error) == "lost":
                raise DeviceLost(f"a worker of the evaluation lost its device: {error}") from error
            raise
