"""Benchmarks, suites of benchmarks, and the gate that a model must pass to be promoted."""

import operator
from typing import Annotated, Literal, get_args

from pydantic import Field, PositiveInt, SerializeAsAny, model_validator

from vila_ops.config.base import Config, Slug
from vila_ops.config.benchmarks import Official, OfficialBenchmark
from vila_ops.config.engine import Precision
from vila_ops.config.few_shot import MixtureSamples
from vila_ops.config.images import Webp
from vila_ops.config.kinds import plugins
from vila_ops.config.mixture import Mixture
from vila_ops.config.sources import OwnFiles, Rendering

Objects = Literal["new", "known"]
"""new: objects that no training mixture names. known: objects that training data names, drawn in a style of the suite's
`kept_out` sources, which no training mixture has."""
Control = Literal["none", "shuffled"]
"""shuffled: the same items with the image of another object each, by a fixed permutation without fixed points."""
CONVERSATIONS: tuple[Rendering, ...] = ("conversation", "questions", "instructions")
"""Renderings with questions and answers."""


class BenchmarkConfig(Config):
    """Base of our benchmarks' config classes: what of a suite's mixture each of them reads."""

    def reads(self) -> tuple[Rendering, ...]:
        """What its items are rendered as."""
        return ("caption",)

    def needs_images(self) -> bool:
        """Whether it reads records with an image only."""
        return "caption" in self.reads()

    def of_known_objects(self) -> bool:
        """Whether it reads images of known objects in place of those of new ones."""
        return getattr(self, "objects", "new") == "known"

    def least_objects(self) -> int:
        """Held-out objects without which it cannot be measured; a shuffled image is that of another object."""
        return 2 if getattr(self, "control", "none") == "shuffled" else 1

    def lacks(self, mixture: Mixture) -> str | None:
        """What a mixture would need for it; None if the mixture has sources that it reads."""
        if any(source.render in self.reads() for source in mixture.sources.values()):
            return None
        return f"reads sources with render {' or '.join(self.reads())}"


class CaptionLoss(BenchmarkConfig):
    """Negative log-likelihood of the true captions given their images, in nats per token."""

    kind: Literal["caption_loss"] = "caption_loss"
    objects: Objects = Field(default="new", exclude_if=lambda objects: objects == "new")
    control: Control = "shuffled"


class MultipleChoice(BenchmarkConfig):
    """Choice among four captions of an image; the distractors are captions of other held-out objects.

    The model's choice is the caption with the highest log p(caption | image) - log p(caption | no image). The rule was
    fixed before any training. `multiple_choice_margin` is that gain of the true caption less the mean gain of the other
    three, in nats: what the image says of its own caption alone, since a model that has learned the style of captions
    gains on all four.
    """

    kind: Literal["multiple_choice"] = "multiple_choice"
    objects: Objects = Field(default="new", exclude_if=lambda objects: objects == "new")
    control: Control = "shuffled"

    def least_objects(self) -> int:
        """Four captions of different objects."""
        return 4


class CaptionCider(BenchmarkConfig):
    """CIDEr-D of greedy captions; the chance level is the most frequent training caption."""

    kind: Literal["cider"] = "cider"
    objects: Objects = Field(default="new", exclude_if=lambda objects: objects == "new")
    control: Control = "shuffled"
    max_new_tokens: PositiveInt = 16


class HeldOutPope(BenchmarkConfig):
    """Accuracy, F1 and share of yes on "Is there a X in the image?", half of them yes; chance level: always yes."""

    kind: Literal["held_out_pope"] = "held_out_pope"
    objects: Objects = Field(default="new", exclude_if=lambda objects: objects == "new")
    control: Control = "shuffled"

    def least_objects(self) -> int:
        """The image's object, that of the shuffled image, and one that is in neither."""
        return 3

    def lacks(self, mixture: Mixture) -> str | None:
        """A file's name, by which sources of files know an object, is nothing to ask about."""
        named = [one for one in mixture.sources.values() if one.render == "caption" and not isinstance(one, OwnFiles)]
        return None if named else "asks for objects by name, and reads render caption of packages and of kind jsonl"


class TextMultipleChoice(BenchmarkConfig):
    """Choice among four meanings of a word, text only, by the highest log-likelihood per token."""

    kind: Literal["text_multiple_choice"] = "text_multiple_choice"

    def reads(self) -> tuple[Rendering, ...]:
        """Words with their meanings."""
        return ("definition",)

    def least_objects(self) -> int:
        """Four meanings."""
        return 4


class TextLoss(BenchmarkConfig):
    """Negative log-likelihood of held-out plain text (words with their meanings), in nats per token."""

    kind: Literal["text_loss"] = "text_loss"

    def reads(self) -> tuple[Rendering, ...]:
        """Words with their meanings."""
        return ("definition",)


class Alignment(BenchmarkConfig):
    """Similarity of the language model's states of an image and of its caption, layer by layer.

    Chamfer similarity of pairwise cosines, after each layer (VILA, arXiv:2312.07533, Fig. 3). The metric is the mean
    over the deeper half of the layers, where the paper finds the effect of training the language model in pre-training.
    With control `shuffled`, `alignment_margin` is that of the matched image less that of the shuffled one: states may
    become alike whatever is shown.
    """

    kind: Literal["alignment"] = "alignment"
    control: Control = "shuffled"
    max_images: PositiveInt = 50
    """Number of images, the suite's first ones; each takes one forward pass."""


class NewNames(BenchmarkConfig):
    """Choice between two made-up names that only the demonstrations of the prompt give.

    Images of both names come before the question, each with its sentence. The model is right where the first name gains
    more than the second from an image of its own, compared with an image of the second name. Control `shuffled`: the
    demonstrations' images say nothing about the question.
    """

    kind: Literal["new_names"] = "new_names"
    rule: Literal["object", "count"] = "object"
    """What a name means. object: one of two objects, and the question shows it mirrored. count: one object or four, and
    the question shows an object that no demonstration has."""
    shots: Literal[2, 4] = 4
    """Demonstrations, half of them of each name."""
    control: Control = "shuffled"

    def least_objects(self) -> int:
        """An item shows five objects, those of its control among them."""
        return 5


class HeldOutLoss(BenchmarkConfig):
    """Negative log-likelihood of all target tokens of held-out samples of any kind, in nats per token.

    These are answers in their chat template, captions, or the text of documents. With control `shuffled` only samples
    with an image are read, with `none` all samples.
    """

    kind: Literal["held_out_loss"] = "held_out_loss"
    control: Control = "shuffled"

    def reads(self) -> tuple[Rendering, ...]:
        """Everything, or everything that may have an image."""
        every: tuple[Rendering, ...] = get_args(Rendering)
        return every if self.control == "none" else ("caption", "document", "questions", "conversation")

    def needs_images(self) -> bool:
        """The control needs an image to shuffle."""
        return self.control == "shuffled"


class AnswerMatch(BenchmarkConfig):
    """Share of held-out conversations whose first answer the model gives word for word, by greedy decoding.

    Case, spaces, and punctuation at both ends do not count. The chance level is the most frequent answer. With control
    `shuffled` only conversations with an image are read, with `none` all of them.
    """

    kind: Literal["answer_match"] = "answer_match"
    control: Control = "shuffled"
    max_new_tokens: PositiveInt = 32

    def reads(self) -> tuple[Rendering, ...]:
        """Questions with answers."""
        return ("conversation", "questions") if self.control == "shuffled" else CONVERSATIONS

    def needs_images(self) -> bool:
        """The control needs an image to shuffle."""
        return self.control == "shuffled"


OwnBenchmark = (
    CaptionLoss
    | MultipleChoice
    | CaptionCider
    | HeldOutPope
    | TextMultipleChoice
    | TextLoss
    | Alignment
    | NewNames
    | HeldOutLoss
    | AnswerMatch
    | Official
)
Benchmark = Annotated[
    OwnBenchmark, Field(discriminator="kind"), SerializeAsAny(), plugins("vila_ops.benchmarks", OwnBenchmark)
]


class MeasureSettings(Config):
    """The settings of any suite that may change a number; they enter the address of each benchmark's result."""

    precision: Precision = "fp32"
    """Precision of the language model during evaluation."""
    bootstrap_resamples: PositiveInt = 2000
    seed: int = 0
    """Seed of distractors, shuffled images and bootstrap."""


class SuiteSettings(MeasureSettings):
    """The settings of a suite on held-out data; they enter the address of each result that is measured on it."""

    split: Literal["validation", "test"]
    """Recipes are chosen on validation; test is read once per committed recipe."""
    max_objects: PositiveInt = 400
    """Objects that the image benchmarks read, in the order of their hash."""
    max_words: PositiveInt = 200
    """Words that the text benchmarks read."""
    max_tokens: PositiveInt = 512
    """Longest evaluation sample, in tokens."""


class OfficialSuite(MeasureSettings):
    """Benchmarks on official files, which any model may be measured on."""

    name: str
    benchmarks: dict[str, Annotated[Official, Field(discriminator="kind")]] = Field(min_length=1)
    """By the name under which the report shows its metrics."""

    @model_validator(mode="after")
    def _demonstrations_are_of_official_files(self) -> "OfficialSuite":
        for name, one in self.benchmarks.items():
            if one.few_shot and isinstance(one.few_shot.pool, MixtureSamples):
                raise ValueError(
                    f"benchmark {name!r} takes its demonstrations from the suite's mixture, and suite {self.name!r} "
                    f"has none; set few_shot.pool to kind train_file, or measure it in a suite with a mixture"
                )
        return self


class Suite(SuiteSettings):
    """The benchmarks of an evaluation and the held-out data that they read."""

    name: str
    mixture: Mixture
    kept_out: tuple[Slug, ...] = Field(default=(), exclude_if=operator.not_)
    """Sources of the mixture that no training mixture reads, in a drawing style of their own. Benchmarks with `objects:
    known` read their images of objects that training data names; no other benchmark reads them as new objects."""
    benchmarks: dict[str, Benchmark] = Field(min_length=1)
    """By the name under which the report shows its metrics."""

    def measures(self, metric: str) -> bool:
        """Whether one of the benchmarks may have a metric, by its name."""
        return any(f"{metric}_".startswith(f"{name}_") for name in self.benchmarks)

    @model_validator(mode="after")
    def _the_mixture_has_what_the_benchmarks_read(self) -> "Suite":
        every: dict[str, Config] = dict(self.benchmarks)  # a plugin's says itself what it reads
        own = {name: one for name, one in every.items() if isinstance(one, BenchmarkConfig)}
        if lacking := [f"{name} {lack}" for name, one in own.items() if (lack := one.lacks(self.mixture))]:
            has = ", ".join(f"{name} (render {source.render})" for name, source in self.mixture.sources.items())
            raise ValueError(
                f"suite {self.name!r} cannot measure: {'; '.join(lacking)}; mixture {self.mixture.name!r} has {has}: "
                f"add such sources, or remove these benchmarks (held_out_loss reads every source)"
            )
        return self

    @model_validator(mode="after")
    def _known_objects_are_of_kept_out_sources(self) -> "Suite":
        captioned = [name for name, source in self.mixture.sources.items() if source.render == "caption"]
        if unfit := [name for name in self.kept_out if name not in captioned]:
            raise ValueError(
                f"suite {self.name!r}: kept_out names {unfit}, which are no sources of mixture {self.mixture.name!r} "
                f"with render caption; those are {captioned}"
            )
        every: dict[str, Config] = dict(self.benchmarks)
        known = [name for name, one in every.items() if isinstance(one, BenchmarkConfig) and one.of_known_objects()]
        if bool(known) != bool(self.kept_out):
            raise ValueError(
                f"suite {self.name!r} has benchmarks of known objects ({known}) and kept_out sources "
                f"({list(self.kept_out)}): each needs the other; set both, or neither"
            )
        return self

    @model_validator(mode="after")
    def _the_mixture_has_the_demonstrations(self) -> "Suite":
        every: dict[str, Config] = dict(self.benchmarks)
        for name, one in every.items():
            if isinstance(one, OfficialBenchmark) and one.few_shot and isinstance(one.few_shot.pool, MixtureSamples):
                self._check_pool(name, one.few_shot.pool)
        return self

    def _check_pool(self, name: str, pool: MixtureSamples) -> None:
        sources = self.mixture.sources
        renders = ("caption", *CONVERSATIONS)
        if unfit := [one for one in pool.sources if one not in sources or sources[one].render not in renders]:
            fit = [one for one, source in sources.items() if source.render in renders]
            raise ValueError(
                f"benchmark {name!r} takes demonstrations from source {unfit[0]!r}, which mixture "
                f"{self.mixture.name!r} does not have, or not with captions or questions; it has {fit}"
            )
        if self.mixture.images.encoding != Webp():
            raise ValueError(
                f"benchmark {name!r} takes demonstrations from mixture {self.mixture.name!r}, which stores images with "
                f"a loss: copies of an item's image could not be told; prepare it with images.encoding: {{kind: webp}}"
            )

    def settings(self) -> SuiteSettings:
        """The settings that may change a score on held-out data, without the suite's name and its other benchmarks."""
        return SuiteSettings.model_validate(self.model_dump(include=set(SuiteSettings.model_fields)))


class Rule(Config):
    """One condition of a gate on a metric of the final suite's report; a bound that is None is not checked.

    `max_regression` and `min_gain` read the 95 % interval of the difference from the champion on the same items;
    without a champion they hold.
    """

    metric: str
    at_least: float | None = None
    at_most: float | None = None
    max_regression: float | None = Field(default=None, ge=0)
    """How much worse than the champion the model may be, in the metric's unit. The end of the interval counts, so few
    items need a larger margin."""
    min_gain: float | None = Field(default=None, ge=0)
    """The model has to be better than the champion by more than this; the end of the interval counts. 0: it has to
    win."""
    slices: Literal["all"] | tuple[str, ...] = ()
    """Slices of the items, such as `category: scenes`, on each of which max_regression and min_gain must hold too."""

    def is_compared(self) -> bool:
        """Whether it reads the difference from the champion."""
        return self.max_regression is not None or self.min_gain is not None

    @model_validator(mode="after")
    def _has_a_bound(self) -> "Rule":
        if self.at_least is None and self.at_most is None and not self.is_compared():
            raise ValueError(f"rule on {self.metric!r} has no bound; set at_least, at_most, max_regression or min_gain")
        if self.slices and not self.is_compared():
            raise ValueError(
                f"rule on {self.metric!r} has slices, on which only max_regression and min_gain are checked; set one "
                f"of them or remove slices"
            )
        return self


class Gate(Config):
    """A model is promoted when every rule holds."""

    model_name: str
    """Name in the MLflow model registry."""
    rules: tuple[Rule, ...] = Field(min_length=1)
    winner: Literal["champion", "challenger"] = Field(default="champion", exclude_if=lambda alias: alias == "champion")
    """Alias of a version that passes. A challenger becomes champion once it has proved itself as a canary."""
    clean_of: tuple[str, ...] = ()
    """Evaluation sets, by their names in `contamination.sources` of the mixtures: the training data of every stage has
    to be without records that overlap with them."""
