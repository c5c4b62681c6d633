"""What is taken out of raw data before it is tokenised, and by which rule."""

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from vila_ops.config.base import Config


class Bounds(Config):
    """The values of a score column with which a record is kept; a record without the column is dropped."""

    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _bound_something(self) -> "Bounds":
        if self.at_least is None and self.at_most is None:
            raise ValueError("bounds without at_least and at_most have no effect; give one of them")
        return self


class TopShare(Config):
    """Keep the best `share` of each raw file, by the sum of some score columns (COYO's selection in the VILA repo)."""

    columns: tuple[str, ...] = Field(min_length=1)
    share: float = Field(gt=0, lt=1)


class Clean(Config):
    """Rules that look at one record of a source, or at its raw file. Nothing set, nothing dropped."""

    min_side: PositiveInt | None = None
    """Pixels of a picture's shorter side."""
    max_aspect: PositiveFloat | None = None
    """Longer side by shorter side."""
    min_words: PositiveInt | None = None
    max_words: PositiveInt | None = None
    scores: dict[str, Bounds] = {}
    """By column of the source, such as clip_similarity_vitb32, watermark_score, nsfw_score_opennsfw2."""
    top_share: TopShare | None = None


class NearDuplicates(Config):
    """Of records that are nearly equal, the first is kept, in the order of sources, files and lines."""

    image_bits: NonNegativeInt | None = None
    """Pictures whose 64-bit perceptual hashes differ in at most so many bits are the same picture."""
    text_similarity: float | None = Field(default=None, gt=0, le=1)
    """Texts whose word 5-grams have at least this Jaccard similarity (estimated by MinHash) are the same text."""

    @model_validator(mode="after")
    def _compare_something(self) -> "NearDuplicates":
        if self.image_bits is None and self.text_similarity is None:
            raise ValueError("near_duplicates compares nothing; set image_bits, text_similarity or both")
        return self
