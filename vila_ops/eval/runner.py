"""Benchmarks on one engine in this process, each sealed as soon as it is measured."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vila_ops.artifacts import attempts, store
from vila_ops.artifacts.execution import execution
from vila_ops.artifacts.kinds import BenchmarkResult
from vila_ops.cluster import whoami
from vila_ops.device import describe, device_of
from vila_ops.eval.benchmark import (
    EvalInputs,
    GenerateRequest,
    Intervals,
    Requests,
    ScoreRequest,
    StatesRequest,
    benchmark_of,
)
from vila_ops.eval.job import EvalJob
from vila_ops.eval.report import ItemScore, Measurement, write_result
from vila_ops.generate.engine import Engine, EngineOptions, generate_all, hidden_states_of, score_all
from vila_ops.generate.load import engine_facts, load_engine
from vila_ops.generate.request import Sampling

log = logging.getLogger(__name__)


@contextmanager
def session(job: EvalJob) -> Iterator[Callable[[str], dict[str, Any]]]:
    """A function that measures and seals a benchmark by the suite's name of it; the model is loaded once.

    It returns which process did it.
    """
    options = EngineOptions(
        feature_root=job.resources.storage.scratch() / "features",
        threads=job.resources.evaluate.threads_per_worker,
        precision=job.suite.precision,
        device=job.resources.device,
    )
    engine = load_engine(job.model, job.resources.evaluate.engine, options)
    runner = BenchmarkRunner(engine, job.inputs())
    try:
        yield lambda name: _measure(runner, job, name)
    finally:
        engine.close()


class BenchmarkRunner:
    """One engine and the inputs of a suite; equal requests of two benchmarks are answered once."""

    def __init__(self, engine: Engine, inputs: EvalInputs) -> None:
        self.engine, self.inputs = engine, inputs
        self._answered: list[tuple[Requests, list[Any]]] = []

    def measure(self, config: Any) -> tuple[Measurement, tuple[ItemScore, ...]]:
        """The metrics of a benchmark, and the scores of its items; `config` is the benchmark's."""
        benchmark = benchmark_of(config.kind)
        items = benchmark.items(self.inputs, config, self.engine.tokenizer)
        requests = benchmark.requests(items, config, self.engine.tokenizer)
        responses = {condition: self.respond(some) for condition, some in requests.items()}
        scored = benchmark.score(items, config, responses)
        settings = self.inputs.settings
        clusters = tuple(item.cluster for item in scored.items)
        intervals = Intervals(clusters, resamples=settings.bootstrap_resamples, seed=settings.seed)
        aggregate = benchmark.aggregate(scored.items, config, intervals)
        measurement = Measurement(
            num_items=len(scored.items),
            num_clusters=len(set(clusters)),
            metrics=aggregate.metrics,
            layers=aggregate.layers,
            answers=scored.answers,
        )
        return measurement, scored.items

    def respond(self, requests: Requests) -> list[Any]:
        """The engine's responses, in the order of the requests, which are all of one class."""
        for earlier, responses in self._answered:
            if earlier == requests:
                return responses
        responses = self._ask(requests)
        self._answered.append((requests, responses))
        return responses

    def _ask(self, requests: Requests) -> list[Any]:
        scored = [one for one in requests if isinstance(one, ScoreRequest)]
        generated = [one for one in requests if isinstance(one, GenerateRequest)]
        states = [one for one in requests if isinstance(one, StatesRequest)]
        if len(requests) not in (len(scored), len(generated), len(states)):
            raise TypeError("one condition has requests of several classes; give each class a condition of its own")
        responses: list[Any] = []
        if scored:
            responses += score_all(self.engine, [(one.prompt, one.continuations) for one in scored])
        if generated:
            responses += self._generate(generated)
        for one in states:
            responses.append(one.reduce(hidden_states_of(self.engine, one.prompt, one.continuation)))
        return responses

    def _generate(self, requests: Sequence[GenerateRequest]) -> list[str]:
        if len(lengths := {one.max_new_tokens for one in requests}) > 1:
            raise ValueError(f"the requests of one condition have max_new_tokens {sorted(lengths)}; give them one")
        tokenizer = self.engine.tokenizer
        sampling = Sampling(max_new_tokens=lengths.pop(), stop_ids=frozenset(tokenizer.stop_ids))
        outputs = generate_all(self.engine, [one.prompt for one in requests], sampling)
        return [tokenizer.decode(output.ids) for output in outputs]


def _measure(runner: BenchmarkRunner, job: EvalJob, name: str) -> dict[str, Any]:
    """Measure and seal one benchmark; returns which process did it."""
    started = time.monotonic()
    config, at = job.suite.benchmarks[name], job.address(name)
    measurement, items = runner.measure(config)
    with attempts.attempt(at, store=job.resources.storage.store) as attempt:
        write_result(attempt, measurement, items)
    seconds = time.monotonic() - started
    store.seal(
        BenchmarkResult,
        at,
        attempt,
        facts={"benchmark": config.kind, "model": job.model.digest},
        execution=execution(launch=job.resources.launch, seconds=seconds, ran=[whoami()])
        | {"engine": engine_facts(job.resources.evaluate.engine), "device": describe(device_of(job.resources.device))},
    )
    log.info("%s: %s in %.0f s", job.suite.name, name, seconds)
    return whoami()
