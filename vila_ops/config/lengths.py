"""Sample lengths of sources, for a plan before anything is prepared."""

from pathlib import Path

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from vila_ops.config.base import Config, Slug
from vila_ops.config.load import read_as


class LengthGroup(Config):
    """Samples of a source with one distribution of lengths."""

    samples: PositiveInt
    images: NonNegativeFloat = 0.0
    """Mean number of images in a sample."""
    text_tokens: PositiveFloat
    """Mean number of text tokens in a sample."""
    spread: NonNegativeFloat = 0.0
    """Standard deviation of the logarithm of the text tokens (lognormal distribution). 0: all equal the mean."""
    target_share: float = Field(default=1.0, gt=0, le=1)
    """Share of the text tokens that are target tokens."""


class Lengths(Config):
    """Sample lengths by source of the recipe's mixtures."""

    sources: dict[Slug, tuple[LengthGroup, ...]] = Field(min_length=1)


def load_lengths(path: Path) -> Lengths:
    """Read lengths from a YAML file."""
    return Lengths.model_validate(read_as(Lengths, path, "lengths", what="lengths of samples"))
