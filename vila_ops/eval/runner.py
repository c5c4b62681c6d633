"""What benchmarks share: the generator, the items, scores that two of them need, and the form of a metric."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from vila_ops.config import Suite
from vila_ops.data.records import Image
from vila_ops.eval.benchmarks.held_out.items import Items
from vila_ops.eval.statistics import Interval, Statistic, cluster_bootstrap, paired_difference
from vila_ops.generate.engine import Engine, score_all
from vila_ops.generate.request import Loglikelihood, Prompt

Role = Literal["model", "control", "chance", "gap"]
"""gap is control minus model for losses and model minus control for the rest: above zero, the image is used."""


@dataclass(frozen=True)
class Metric:
    """One number of a report."""

    name: str
    role: Role
    value: float
    low: float
    high: float
    n: int
    lower_is_better: bool
    unit: str


class BenchmarkRunner:
    """One model on one suite's items."""

    def __init__(self, generator: Engine, items: Items, suite: Suite) -> None:
        self.generator = generator
        self.items = items
        self.suite = suite
        self.objects = [image.object for image in items.images]

    @cached_property
    def own(self) -> list[list[Loglikelihood]]:
        """Of each image its true caption first, then the distractors, in the format that pairs are trained in."""
        return self._score_captions([image.image for image in self.items.images], self._choices)

    @cached_property
    def control(self) -> list[list[Loglikelihood]]:
        """The same with another object's image; the distractors only where a choice among them is controlled."""
        choosing = any(b.kind == "multiple_choice" and b.control != "none" for b in self.suite.benchmarks.values())
        choices = self._choices if choosing else [choice[:1] for choice in self._choices]
        return self._score_captions([image.other_image for image in self.items.images], choices)

    @cached_property
    def blind(self) -> list[list[Loglikelihood]]:
        """The same without any image."""
        return score_all(self.generator, [(Prompt([self._bos()]), choice) for choice in self._choices])

    @cached_property
    def _choices(self) -> list[list[list[int]]]:
        return [[self._ending(text) for text in (p.caption, *p.distractors)] for p in self.items.images]

    def caption_prompt(self, image: bytes) -> Prompt:
        """bos and the image: what stands before a caption in the pairs."""
        return Prompt([self._bos(), *self.generator.tokenizer.image], (image,))

    def chat_prompt(self, question: str, image: bytes | None) -> Prompt:
        """A question, after an image if there is one, through the chat template."""
        parts = (question,) if image is None else (Image(image), question)
        return Prompt(self.generator.tokenizer.prompt([("user", parts)]), () if image is None else (image,))

    def metric(
        self, name: str, role: Role, values: ArrayLike, *, statistic: Statistic, unit: str, clusters: Sequence[str]
    ) -> Metric:
        """A value with its bootstrap interval over clusters."""
        found = cluster_bootstrap(values, clusters, statistic=statistic, resamples=self._resamples, seed=self._seed)
        return _metric(name, role, found, unit)

    def gap(
        self,
        name: str,
        values: tuple[ArrayLike, ArrayLike],
        *,
        statistic: Statistic,
        unit: str,
        clusters: Sequence[str] | None = None,
    ) -> Metric:
        """The first minus the second on the same images (all, unless `clusters` names fewer), with its interval."""
        objects = self.objects if clusters is None else clusters
        found = paired_difference(*values, objects, statistic=statistic, resamples=self._resamples, seed=self._seed)
        return _metric(name, "gap", found, unit)

    @property
    def _resamples(self) -> int:
        return self.suite.bootstrap_resamples

    @property
    def _seed(self) -> int:
        return self.suite.seed

    def _score_captions(self, images: list[bytes], choices: list[list[list[int]]]) -> list[list[Loglikelihood]]:
        return score_all(
            self.generator,
            [(self.caption_prompt(image), choice) for image, choice in zip(images, choices, strict=True)],
        )

    def _ending(self, text: str) -> list[int]:
        return [*self.generator.tokenizer.text_ids(text), self.generator.tokenizer.eos_id]

    def _bos(self) -> int:
        return self.generator.tokenizer.bos_id


def nll_and_tokens(scores: Sequence[Loglikelihood]) -> Any:
    """(N, 2) for a ratio statistic: nats and tokens of each item."""
    return np.array([[score.nll, score.tokens] for score in scores], float)


def as_json(metrics: Sequence[Metric]) -> list[dict[str, Any]]:
    """The metrics of a report file."""
    return [asdict(metric) for metric in metrics]


def _metric(name: str, role: Role, found: Interval, unit: str) -> Metric:
    lower = unit.startswith("nats") and role != "gap"
    return Metric(name, role, found.value, found.low, found.high, found.n, lower, unit)
