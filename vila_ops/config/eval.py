"""Benchmarks, suites of benchmarks, and the gate that a model must pass to be promoted."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, SerializeAsAny, model_validator

from vila_ops.config.base import Config
from vila_ops.config.kinds import plugins
from vila_ops.config.mixture import Mixture

Control = Literal["none", "shuffled"]
"""shuffled: the same items with the image of another object each, by a fixed permutation without fixed points."""


class CaptionLoss(Config):
    """Negative log-likelihood of the true captions given their images, in nats per token."""

    kind: Literal["caption_loss"] = "caption_loss"
    control: Control = "shuffled"


class MultipleChoice(Config):
    """Choice among four captions of an image; the distractors are captions of other held-out objects.

    The model's choice is the caption with the highest log p(caption | image) - log p(caption | no image). The rule was
    fixed before any training.
    """

    kind: Literal["multiple_choice"] = "multiple_choice"
    control: Control = "shuffled"


class CaptionCider(Config):
    """CIDEr-D of greedy captions; the chance level is the most frequent training caption."""

    kind: Literal["cider"] = "cider"
    control: Control = "shuffled"
    max_new_tokens: PositiveInt = 16


class PopeBenchmark(Config):
    """Accuracy, F1 and share of yes on "Is there a X in the image?", half of them yes; chance level: always yes."""

    kind: Literal["pope"] = "pope"
    control: Control = "shuffled"


class TextMultipleChoice(Config):
    """Choice among four meanings of a word, text only, by the highest log-likelihood per token."""

    kind: Literal["text_multiple_choice"] = "text_multiple_choice"


class TextLoss(Config):
    """Negative log-likelihood of held-out plain text (words with their meanings), in nats per token."""

    kind: Literal["text_loss"] = "text_loss"


class Alignment(Config):
    """Similarity of the language model's states of an image and of its caption, layer by layer.

    Chamfer similarity of pairwise cosines, after each layer (VILA, arXiv:2312.07533, Fig. 3). The metric is the mean
    over the deeper half of the layers, where the paper finds the effect of training the language model in pre-training.
    """

    kind: Literal["alignment"] = "alignment"
    control: Control = "shuffled"
    max_images: PositiveInt = 50
    """Number of images, the suite's first ones; each takes one forward pass."""


OwnBenchmark = CaptionLoss | MultipleChoice | CaptionCider | PopeBenchmark | TextMultipleChoice | TextLoss | Alignment
Benchmark = Annotated[
    OwnBenchmark, Field(discriminator="kind"), SerializeAsAny(), plugins("vila_ops.benchmarks", OwnBenchmark)
]


class SuiteSettings(Config):
    """The settings of a suite that may change scores; they enter the address of each benchmark's result."""

    split: Literal["validation", "test"]
    """Recipes are chosen on validation; test is read once per committed recipe."""
    max_objects: PositiveInt = 400
    """Objects that the image benchmarks read, in the order of their hash."""
    max_words: PositiveInt = 200
    """Words that the text benchmarks read."""
    max_tokens: PositiveInt = 512
    """Longest evaluation sample, in tokens."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the language model during evaluation."""
    bootstrap_resamples: PositiveInt = 2000
    seed: int = 0
    """Seed of distractors, shuffled images and bootstrap."""


class Suite(SuiteSettings):
    """The benchmarks of an evaluation and the data that they read."""

    name: str
    mixture: Mixture
    benchmarks: dict[str, Benchmark] = Field(min_length=1)
    """By the name under which the report shows its metrics."""

    def settings(self) -> SuiteSettings:
        """The settings that may change a benchmark's scores, without the suite's name and its other benchmarks."""
        return SuiteSettings.model_validate(self.model_dump(include=set(SuiteSettings.model_fields)))


class Rule(Config):
    """One condition of a gate on a metric of the report; a bound that is None is not checked."""

    metric: str
    at_least: float | None = None
    at_most: float | None = None
    max_regression: float | None = Field(default=None, ge=0)
    """Largest regression from the champion's value, in the metric's unit; without a champion the rule passes."""

    @model_validator(mode="after")
    def _has_a_bound(self) -> "Rule":
        if self.at_least is None and self.at_most is None and self.max_regression is None:
            raise ValueError(f"rule on {self.metric!r} has no bound; set at_least, at_most or max_regression")
        return self


class Gate(Config):
    """A model is promoted when every rule holds."""

    model_name: str
    """Name in the MLflow model registry."""
    rules: tuple[Rule, ...] = Field(min_length=1)
