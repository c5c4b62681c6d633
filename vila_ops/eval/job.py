"""The work of an evaluating process, small enough to send."""

from vila_ops.artifacts import store
from vila_ops.artifacts.kinds import BenchmarkResult, Checkpoint, Dataset, Pretrained
from vila_ops.config import Config, Resources, Suite
from vila_ops.eval.benchmark import EvalInputs, benchmark_of, plugin_of
from vila_ops.generate.load import engine_facts


class EvalJob(Config):
    """A suite on a model."""

    suite: Suite
    model: Checkpoint | Pretrained
    data: Dataset
    resources: Resources

    def inputs(self) -> EvalInputs:
        """What the benchmarks read their items from."""
        return EvalInputs.of(self.suite, self.data)

    def address(self, name: str) -> store.Address:
        """Where the result of a benchmark is: it depends neither on the suite's name nor on its other benchmarks.

        An engine of a third-party package enters it with its settings.
        """
        benchmark = self.suite.benchmarks[name]
        recipe = {
            "benchmark": benchmark.model_dump(mode="json"),
            "plugin": plugin_of(benchmark.kind),
            "inputs": self.inputs().model_dump(mode="json", exclude={"data"}),
        }
        engine = engine_facts(self.resources.evaluate.engine)
        if "plugin" in engine:  # its numbers may be others than those of our engines, which agree
            recipe["engine"] = engine
        return store.address(
            BenchmarkResult,
            revision=benchmark_of(benchmark.kind).REVISION,
            recipe=recipe,
            parents=(self.model.digest, self.data.digest),
        )

    def result(self, name: str) -> BenchmarkResult | None:
        """The result of a benchmark, None where it was not measured yet. Raises CorruptArtifact."""
        return store.find(BenchmarkResult, self.address(name), store=self.resources.storage.store)
