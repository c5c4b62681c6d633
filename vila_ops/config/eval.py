"""What is measured, and what a model must show to be promoted."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from vila_ops.config.base import Config
from vila_ops.config.mixture import Mixture

Control = Literal["none", "shuffled"]
"""shuffled: every image is swapped for another object's by a fixed permutation without fixed points."""


class CaptionLoss(Config):
    """Mean negative log-likelihood (nats per token) of the true caption given its image."""

    kind: Literal["caption_loss"] = "caption_loss"
    control: Control = "shuffled"


class MultipleChoice(Config):
    """Which of four captions belongs to the image; distractors are captions of other held-out objects.

    Rule, fixed before any training: the option with the highest log p(caption | image) - log p(caption | no image).
    """

    kind: Literal["multiple_choice"] = "multiple_choice"
    control: Control = "shuffled"


class CaptionCider(Config):
    """CIDEr-D of greedy captions; chance is the most frequent training caption."""

    kind: Literal["cider"] = "cider"
    control: Control = "shuffled"
    max_new_tokens: PositiveInt = 16


class PopeBenchmark(Config):
    """ "Is there a X in the image?", half yes, half no: accuracy, F1 and yes-ratio; chance is always yes."""

    kind: Literal["pope"] = "pope"
    control: Control = "shuffled"


class TextMultipleChoice(Config):
    """Four-way choice of a word's meaning, text only; the option with the highest log-likelihood per token."""

    kind: Literal["text_multiple_choice"] = "text_multiple_choice"


class TextLoss(Config):
    """Mean negative log-likelihood (nats per token) of held-out plain text: words with their meanings."""

    kind: Literal["text_loss"] = "text_loss"


class Alignment(Config):
    """How alike the language model's states of an image and of its caption are, layer by layer (the paper's Fig. 3).

    Chamfer similarity over pairwise cosines, after each layer. The report's number is the mean over the deeper half of
    the layers, where the paper finds what training the language model in pre-training changes.
    """

    kind: Literal["alignment"] = "alignment"
    control: Control = "shuffled"
    max_images: PositiveInt = 50
    """The suite's first images; each is a pass of its own."""


Benchmark = Annotated[
    CaptionLoss | MultipleChoice | CaptionCider | PopeBenchmark | TextMultipleChoice | TextLoss | Alignment,
    Field(discriminator="kind"),
]


class Suite(Config):
    """The benchmarks of an evaluation and the data that they read."""

    name: str
    mixture: Mixture
    split: Literal["validation", "test"]
    """Choices of recipe are made on validation; test is read once per committed recipe."""
    benchmarks: dict[str, Benchmark] = Field(min_length=1)
    max_objects: PositiveInt = 400
    """Objects read by the image benchmarks, in the order of their hash."""
    max_words: PositiveInt = 200
    """Words read by the text benchmarks."""
    max_tokens: PositiveInt = 512
    """Longest evaluation sample."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the language model while it is evaluated."""
    bootstrap_resamples: PositiveInt = 2000
    seed: int = 0
    """Of distractors, shuffle and bootstrap."""


class Rule(Config):
    """One condition of a gate on a metric of the report; a bound that is None is not asked for."""

    metric: str
    at_least: float | None = None
    at_most: float | None = None
    max_regression: float | None = Field(default=None, ge=0)
    """How much worse than the champion's value it may be; passes where there is no champion."""

    @model_validator(mode="after")
    def _asks_something(self) -> "Rule":
        if self.at_least is None and self.at_most is None and self.max_regression is None:
            raise ValueError(f"rule on {self.metric!r} asks nothing; set at_least, at_most or max_regression")
        return self


class Gate(Config):
    """A model is promoted when every rule holds."""

    model_name: str
    """Name in the MLflow model registry."""
    rules: tuple[Rule, ...] = Field(min_length=1)
