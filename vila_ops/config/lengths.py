"""How long the samples of sources are, for a plan before anything is prepared."""

from pathlib import Path

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from vila_ops.config.base import Config, Slug
from vila_ops.config.load import read


class LengthGroup(Config):
    """Samples of a source that are alike."""

    samples: PositiveInt
    images: NonNegativeFloat = 0.0
    """Images of a sample, in the mean."""
    text_tokens: PositiveFloat
    """Tokens beside the images' of a sample, in the mean."""
    spread: NonNegativeFloat = 0.0
    """Of their lognormal distribution: the deviation of their logarithm. 0: all are the mean."""
    target_share: float = Field(default=1.0, gt=0, le=1)
    """Of the text that is learnt."""


class Lengths(Config):
    """By source of the recipe's mixtures."""

    sources: dict[Slug, tuple[LengthGroup, ...]] = Field(min_length=1)


def load_lengths(path: Path) -> Lengths:
    """The lengths of a file."""
    return Lengths.model_validate(read(path))
