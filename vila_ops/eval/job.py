"""The work of an evaluating process, small enough to send."""

from vila_ops.artifacts import store
from vila_ops.artifacts.kinds import BenchmarkResult, Checkpoint, Dataset, Pretrained
from vila_ops.config import Config, Resources, Suite
from vila_ops.eval.benchmark import EvalInputs, benchmark_of, plugin_of


class EvalJob(Config):
    """A suite on a model, or, with `benchmarks`, some of its benchmarks."""

    suite: Suite
    model: Checkpoint | Pretrained
    data: Dataset
    resources: Resources
    benchmarks: tuple[str, ...] = ()
    """The suite's names of those that are to be measured."""

    def inputs(self) -> EvalInputs:
        """What the benchmarks read their items from."""
        return EvalInputs.of(self.suite, self.data)

    def address(self, name: str) -> store.Address:
        """Where the result of a benchmark is: it depends neither on the suite's name nor on its other benchmarks."""
        benchmark = self.suite.benchmarks[name]
        recipe = {
            "benchmark": benchmark.model_dump(mode="json"),
            "plugin": plugin_of(benchmark.kind),
            "inputs": self.inputs().model_dump(mode="json", exclude={"data"}),
        }
        return store.address(
            BenchmarkResult,
            revision=benchmark_of(benchmark.kind).REVISION,
            recipe=recipe,
            parents=(self.model.digest, self.data.digest),
        )

    def result(self, name: str) -> BenchmarkResult | None:
        """The result of a benchmark, None where it was not measured yet. Raises CorruptArtifact."""
        return store.find(BenchmarkResult, self.address(name), store=self.resources.storage.store)
