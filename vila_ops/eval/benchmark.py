"""The protocol of a benchmark, the table of ours, and the confidence intervals that they share.

A benchmark is a module with a `REVISION` and four functions, see `BenchmarkModule`: items -> requests -> (responses of
the engine) -> scores of each item -> metrics. All but `items`, which reads the data, are pure. Third-party packages add
benchmarks by entry points of the group `vila_ops.benchmarks`; see `config.kinds`.
"""

# N items, K columns of a score

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from vila_ops.artifacts.kinds import Dataset
from vila_ops.config import Config, Suite
from vila_ops.config.eval import CONVERSATIONS, SuiteSettings
from vila_ops.config.kinds import module_of, provenance
from vila_ops.eval.report import ItemAnswer, ItemScore, LayerPoint, Metric, MetricRole
from vila_ops.eval.statistics import FloatArray, Interval, Statistic, cluster_bootstrap, paired_difference
from vila_ops.generate.request import Prompt

if TYPE_CHECKING:
    from vila_ops.data.text.conversation import Tokenizer

HELD_OUT = "vila_ops.eval.benchmarks.held_out"
BENCHMARKS = {
    kind: f"{HELD_OUT}.{kind}"
    for kind in (
        *("alignment", "answer_match", "caption_loss", "cider", "held_out_loss", "multiple_choice", "pope"),
        *("text_loss", "text_multiple_choice"),
    )
}
"""Our kinds and their modules, which are imported when a suite has such a benchmark."""


class EvalInputs(Config):
    """What the items of a benchmark are read from. Its scores depend on this, on its config and on the model alone."""

    data: Dataset
    settings: SuiteSettings
    captions: tuple[str, ...]
    """Sources of the dataset whose records are captioned images."""
    definitions: tuple[str, ...]
    """Sources of the dataset whose records are words with their meanings."""
    conversations: tuple[str, ...] = Field(default=(), exclude_if=operator.not_)
    """Sources of the dataset whose records are questions with answers."""

    @classmethod
    def of(cls, suite: Suite, data: Dataset) -> "EvalInputs":
        """The inputs of every benchmark of a suite."""
        renders = {name: source.render for name, source in sorted(suite.mixture.sources.items())}
        return cls(
            data=data,
            settings=suite.settings(),
            captions=tuple(name for name, render in renders.items() if render == "caption"),
            definitions=tuple(name for name, render in renders.items() if render == "definition"),
            conversations=tuple(name for name, render in renders.items() if render in CONVERSATIONS),
        )


@dataclass(frozen=True)
class ScoreRequest:
    """Likelihoods of continuations of a prompt; the response is one `Loglikelihood` for each."""

    prompt: Prompt
    continuations: tuple[list[int], ...]


@dataclass(frozen=True)
class GenerateRequest:
    """A greedy answer to a prompt; the response is its text."""

    prompt: Prompt
    max_new_tokens: int


@dataclass(frozen=True)
class StatesRequest:
    """Hidden states of a prompt and a continuation, (layers + 1, T, D); the response is what `reduce` keeps of them."""

    prompt: Prompt
    continuation: list[int]
    reduce: Callable[[NDArray[np.float64]], Any]


Requests = Sequence[ScoreRequest] | Sequence[GenerateRequest] | Sequence[StatesRequest]


@dataclass(frozen=True)
class Scored:
    """The scores of each item, and what the model answered."""

    items: tuple[ItemScore, ...]
    answers: tuple[ItemAnswer, ...] = ()


@dataclass(frozen=True)
class Aggregate:
    """The metrics of all items, and the numbers that have a value for each layer."""

    metrics: tuple[Metric, ...]
    layers: tuple[LayerPoint, ...] = ()


class BenchmarkModule(Protocol):
    """A benchmark; `config` is its own config class in each function."""

    REVISION: int
    """Raised when the scores or metrics change for the same model and data."""

    def items(self, inputs: EvalInputs, config: Any, tokenizer: "Tokenizer") -> Sequence[Any]:
        """The items in their order. Raises ValueError where the data cannot give them."""

    def requests(self, items: Sequence[Any], config: Any, tokenizer: "Tokenizer") -> Mapping[str, Requests]:
        """Requests to the engine by condition: `matched`, `shuffled` or `no_image`; each in the order of the items."""

    def score(self, items: Sequence[Any], config: Any, responses: Mapping[str, Sequence[Any]]) -> Scored:
        """The scores of each item from the responses, which are by condition and in the order of the requests."""

    def aggregate(self, scores: Sequence[ItemScore], config: Any, intervals: "Intervals") -> Aggregate:
        """The metrics; a function of the items' scores alone."""


def benchmark_of(kind: str) -> BenchmarkModule:
    """The module of a kind of benchmark. Raises ValueError for a kind that no installed package has."""
    return cast("BenchmarkModule", module_of("vila_ops.benchmarks", BENCHMARKS, kind))


def plugin_of(kind: str) -> dict[str, Any] | None:
    """Package, version and revision of a third-party benchmark; None for one of ours."""
    return provenance("vila_ops.benchmarks", BENCHMARKS, kind)


def tables(scores: Sequence[ItemScore]) -> dict[MetricRole, FloatArray]:
    """The scores of all items by role, (N, K) each; every item has the same roles and columns."""
    return {role: np.array([list(one.scores[role].values()) for one in scores], float) for role in scores[0].scores}


@dataclass(frozen=True)
class Intervals:
    """Makes metrics with the bootstrap intervals of a suite; values are in the order of the items."""

    clusters: tuple[str, ...]
    """The cluster of each item."""
    resamples: int
    seed: int

    def metric(self, name: str, role: MetricRole, values: FloatArray, *, statistic: Statistic, unit: str) -> Metric:
        """A statistic of one role's scores with its interval."""
        interval = cluster_bootstrap(
            values, self.clusters, statistic=statistic, resamples=self.resamples, seed=self.seed
        )
        return _metric(name, role, interval, unit)

    def metrics(
        self, name: str, by_role: Mapping[MetricRole, FloatArray], *, statistic: Statistic, unit: str
    ) -> tuple[Metric, ...]:
        """The statistic of each role's scores (`tables`), and with a control the gap between it and the model.

        The gap has the sign that `MetricRole` states.
        """
        listed = [self.metric(name, role, values, statistic=statistic, unit=unit) for role, values in by_role.items()]
        if "control" in by_role:
            pair = (by_role["model"], by_role["control"])
            first, second = reversed(pair) if _is_loss(unit) else pair
            listed.append(self.gap(name, first, second, statistic=statistic, unit=unit))
        return tuple(listed)

    def gap(self, name: str, first: FloatArray, second: FloatArray, *, statistic: Statistic, unit: str) -> Metric:
        """The statistic of the first scores minus that of the second on the same items, with its interval."""
        interval = paired_difference(
            first, second, self.clusters, statistic=statistic, resamples=self.resamples, seed=self.seed
        )
        return _metric(name, "gap", interval, unit)


def chance(name: str, level: float, *, n: int, unit: str) -> Metric:
    """A chance level that is known, so that it has no interval."""
    return Metric(name=name, role="chance", value=level, low=level, high=level, n=n, lower_is_better=False, unit=unit)


def _is_loss(unit: str) -> bool:
    return unit.startswith("nats")


def _metric(name: str, role: MetricRole, interval: Interval, unit: str) -> Metric:
    return Metric(
        name=name,
        role=role,
        value=interval.value,
        low=interval.low,
        high=interval.high,
        n=interval.n,
        lower_is_better=_is_loss(unit) and role != "gap",
        unit=unit,
    )
