"""Few-shot prompts: how many demonstrations come before an item, from where, which, and in which order."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from vila_ops.config.base import Config


class TrainFile(Config):
    """The train file of the benchmark, which lies beside its other official files; `vila-ops benchmark list` says who
    has one."""

    kind: Literal["train_file"] = "train_file"


class MixtureSamples(Config):
    """Samples of the suite's mixture, as they were prepared: captions, or questions with one answer."""

    kind: Literal["mixture"] = "mixture"
    split: Literal["train", "validation", "test"] = "train"
    sources: tuple[str, ...] = Field(min_length=1)
    """Names of the mixture's sources."""


Pool = Annotated[TrainFile | MixtureSamples, Field(discriminator="kind")]
"""Where demonstrations come from."""


class BySeed(Config):
    """Demonstrations that are drawn for each item; those of fewer shots are among those of more."""

    kind: Literal["seed"] = "seed"
    order: Literal["drawn", "reversed"] = "drawn"


class Nearest(Config):
    """The demonstrations whose image is the most similar to the item's first one (RICES).

    That is the cosine similarity of the means over patches of the features that the model's tower gives. Among equal
    ones, to six decimals, the smaller id is nearer.
    """

    kind: Literal["nearest"] = "nearest"
    order: Literal["nearest_last", "nearest_first"] = "nearest_last"


Selection = Annotated[BySeed | Nearest, Field(discriminator="kind")]
"""Which demonstrations an item has."""


class FewShot(Config):
    """Demonstrations before each item. One with an image of the item itself is never shown."""

    shots: int = Field(ge=0)
    """0 is the same as no few-shot setting."""
    pool: Pool = TrainFile()
    selection: Selection = BySeed()
    candidates: PositiveInt | None = 2048
    """Only so many of the pool, drawn by the seed; None: all."""
    control: Literal["none", "text_only", "shuffled_images"] = "none"
    """text_only: demonstrations without their images. shuffled_images: with the images of other demonstrations."""
    seed: int = 0
    """Of candidates, of drawn demonstrations and of shuffled images."""

    @model_validator(mode="after")
    def _a_control_has_shots(self) -> "FewShot":
        if self.control != "none" and not self.shots:
            raise ValueError(f"control {self.control} has no effect without demonstrations; set shots or no control")
        return self

    def variant(self) -> str:
        """The part of a metric's name: numbers of other shots are other numbers."""
        chosen = "" if isinstance(self.selection, BySeed) else f"_{self.selection.kind}"
        control = "" if self.control == "none" else f"_{self.control}"
        return f"{self.shots}shot{chosen}{control}"
