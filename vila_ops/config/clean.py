"""What is taken out of raw data before it is tokenised, and by which rule."""

from pydantic import Field, PositiveInt, model_validator

from vila_ops.config.base import Config


class Bounds(Config):
    """The values of a score column with which a record is kept; a record without the column is dropped."""

    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _bound_something(self) -> "Bounds":
        if self.at_least is None and self.at_most is None:
            raise ValueError("bounds without at_least and at_most have no effect; give one of them")
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise ValueError(f"no value is at least {self.at_least} and at most {self.at_most}; exchange them")
        return self


class TopShare(Config):
    """Keep the best `share` of each raw file, by the sum of some score columns (COYO's selection in the VILA repo:
    clip_similarity_vitb32 + clip_similarity_vitl14, share 0.2, above 0.6)."""

    columns: tuple[str, ...] = Field(min_length=1)
    share: float = Field(gt=0, lt=1)
    """Of the file's records that have the columns, whatever other rules say of them; rounded down."""
    above: float | None = None
    """Of the best, keep only those whose sum is greater."""


class Clean(Config):
    """Rules that look at one record of a source, or at its raw file. Nothing set, nothing dropped.

    An image that breaks a rule is left out of a document that has others; else it costs the record.
    """

    min_side: PositiveInt | None = None
    """Pixels of an image's shorter side."""
    max_aspect: float | None = Field(default=None, ge=1)
    """Longer side by shorter side."""
    min_words: PositiveInt | None = None
    """Words between spaces, in all texts of a record together."""
    max_words: PositiveInt | None = None
    scores: dict[str, Bounds] = {}
    """By column of the source, such as clip_similarity_vitb32, watermark_score, nsfw_score_opennsfw2; a column that a
    source has for each image is a rule about images."""
    top_share: TopShare | None = None

    @model_validator(mode="after")
    def _some_text_passes(self) -> "Clean":
        if self.min_words is not None and self.max_words is not None and self.min_words > self.max_words:
            raise ValueError(f"no text has {self.min_words} words or more and {self.max_words} or fewer; exchange them")
        return self


MAX_IMAGE_BITS = 6
"""99.9 % of re-encoded copies lie within it; two bits more take the index six times as long."""


class NearDuplicates(Config):
    """A record that nearly equals an earlier one is dropped, in the order of sources, files and lines."""

    image_bits: int | None = Field(default=None, ge=0, le=MAX_IMAGE_BITS)
    """Images that look alike and whose 64-bit perceptual hashes differ in at most so many bits are the same image.
    A record is dropped when all its images were seen before; so leave it unset where a data set has several
    conversations about one image."""
    text_similarity: float | None = Field(default=None, ge=0.5, le=1)
    """Texts whose word 5-grams have at least this Jaccard similarity (estimated by MinHash) are the same text. Short
    texts of records with images are not compared: captions and questions recur under other images."""

    @model_validator(mode="after")
    def _compare_something(self) -> "NearDuplicates":
        if self.image_bits is None and self.text_similarity is None:
            raise ValueError("near_duplicates compares nothing; set image_bits, text_similarity or both")
        return self
