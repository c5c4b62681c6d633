"""The work of an evaluating process, small enough to send."""

from collections.abc import Sequence
from typing import Any

from vila_ops.artifacts import store
from vila_ops.artifacts.kinds import (
    Answers,
    BenchmarkFiles,
    BenchmarkResult,
    Checkpoint,
    Dataset,
    Endpoint,
    Pretrained,
)
from vila_ops.config import Config, OfficialSuite, Resources, Suite
from vila_ops.config.benchmarks import OfficialBenchmark
from vila_ops.config.eval import MeasureSettings
from vila_ops.eval.benchmark import benchmark_of, plugin_of
from vila_ops.eval.benchmarks.held_out.items import EvalInputs
from vila_ops.eval.few_shot import REVISION as FEW_SHOT
from vila_ops.eval.report import read_result
from vila_ops.generate.load import engine_facts

ANSWERS = 1
"""Revision of the responses to given requests: raised when a target is asked otherwise."""


class EvalJob(Config):
    """A suite on a model."""

    suite: Suite | OfficialSuite
    model: Checkpoint | Pretrained | Endpoint
    data: Dataset | None = None
    """The held-out data of a `Suite`."""
    files: dict[str, BenchmarkFiles] = {}
    """The sealed files of each official benchmark, by the suite's name."""
    pools: dict[str, BenchmarkFiles] = {}
    """The sealed train file of each benchmark whose demonstrations are from there."""
    resources: Resources

    def inputs(self) -> EvalInputs:
        """What the benchmarks on held-out data read their items from."""
        assert isinstance(self.suite, Suite)
        assert self.data is not None
        return EvalInputs.of(self.suite, self.data)

    def settings(self) -> MeasureSettings:
        """The settings of the suite that may change a number of any benchmark."""
        return MeasureSettings.model_validate(self.suite.model_dump(include=set(MeasureSettings.model_fields)))

    def address(self, name: str, *, again: bool = False) -> store.Address:
        """Where the result of a benchmark is: it depends neither on the suite's name nor on its other benchmarks.

        An engine of a third-party package enters it with its settings. `again`: the result with answers to what timed
        out at first.
        """
        benchmark: Config = self.suite.benchmarks[name]
        kind: str = benchmark.kind  # type: ignore[attr-defined]
        if name in self.files:
            inputs, parents = self.settings().model_dump(mode="json"), [self.files[name].digest]
        else:
            read = self.inputs()
            inputs, parents = read.model_dump(mode="json", exclude={"data"}), [read.data.digest]
        own = benchmark.model_dump(mode="json")
        recipe: dict[str, Any] = {"benchmark": own, "plugin": plugin_of(kind), "inputs": inputs}
        if isinstance(benchmark, OfficialBenchmark) and benchmark.few_shot:
            recipe |= {"few_shot": FEW_SHOT}
            parents.append(self.pool_digest(name))
        if again:
            recipe |= {"again": True}
        return store.address(
            BenchmarkResult,
            revision=benchmark_of(kind).REVISION,
            recipe=recipe | self._other_engine(),
            parents=(self.model.digest, *parents),
        )

    def pool_digest(self, name: str) -> str:
        """Digest of what the demonstrations of a benchmark are from: its train file, or the suite's data."""
        if name in self.pools:
            return self.pools[name].digest
        assert self.data is not None
        return self.data.digest

    def result(self, name: str) -> BenchmarkResult | None:
        """The last result of a benchmark, None where it was not measured yet. Raises CorruptArtifact."""
        places = (self.address(name, again=True), self.address(name))
        results = (store.find(BenchmarkResult, at, store=self.resources.storage.store) for at in places)
        return next((result for result in results if result), None)

    def timed_out(self, name: str) -> bool:
        """Whether requests of a benchmark, or of its judge, may have timed out that are to be asked once more.

        Raises CorruptArtifact.
        """
        if not self.resources.evaluate.endpoint.ask_again:
            return False
        last = self.result(name)
        first = self.address(name).uri(self.resources.storage.store)
        if last is None or last.uri != first:
            return False
        late = {"not_judged", *(("timeout",) if isinstance(self.model, Endpoint) else ())}
        return not late.isdisjoint(read_result(last).failed)

    def answers_address(self, requests: Sequence[str], *, again: bool = False) -> store.Address:
        """Where the responses to a shard of requests are, by their hashes: whichever benchmark asks them.

        `again`: the second responses to requests that timed out.
        """
        recipe: dict[str, Any] = {"requests": list(requests), "precision": self.suite.precision}
        recipe |= self._other_engine() | ({"again": True} if again else {})
        return store.address(Answers, revision=ANSWERS, recipe=recipe, parents=(self.model.digest,))

    def _other_engine(self) -> dict[str, Any]:
        """An engine other than torch: its numbers may be others."""
        if isinstance(self.model, Endpoint):
            return {}
        engine = engine_facts(self.resources.evaluate.engine)
        return {} if engine["kind"] == "torch" else {"engine": engine}
