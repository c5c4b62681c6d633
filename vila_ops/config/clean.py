"""Rules that drop raw records before they are tokenised."""

from pydantic import Field, PositiveInt, model_validator

from vila_ops.config.base import Config


class Bounds(Config):
    """The range of a score column in which a record is kept; a record without the column is dropped."""

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
    """Share of the file's records that have the columns, including records that other rules drop; rounded down."""
    above: float | None = None
    """Keep only those of the best whose sum is greater than this."""


class Clean(Config):
    """Rules on one record of a source, or on its raw file. Without a rule nothing is dropped.

    An image that breaks a rule is left out of a document that keeps another image; otherwise the record is dropped.
    """

    min_side: PositiveInt | None = None
    """Least number of pixels of an image's shorter side."""
    max_aspect: float | None = Field(default=None, ge=1)
    """Largest ratio of an image's longer side to its shorter side."""
    min_words: PositiveInt | None = None
    """Least number of whitespace-separated words in all texts of a record together."""
    max_words: PositiveInt | None = None
    scores: dict[str, Bounds] = {}
    """Bounds by column of the source, such as clip_similarity_vitb32, watermark_score, nsfw_score_opennsfw2. A column
    with a value for each image bounds images instead of records."""
    top_share: TopShare | None = None

    @model_validator(mode="after")
    def _some_text_passes(self) -> "Clean":
        if self.min_words is not None and self.max_words is not None and self.min_words > self.max_words:
            raise ValueError(f"no text has {self.min_words} words or more and {self.max_words} or fewer; exchange them")
        return self


MAX_IMAGE_BITS = 6
"""99.9 % of re-encoded copies differ in at most so many bits; two bits more take the search six times as long."""


class NearDuplicates(Config):
    """Drop a record that nearly equals an earlier one, in the order of sources, files and lines."""

    image_bits: int | None = Field(default=None, ge=0, le=MAX_IMAGE_BITS)
    """Two images count as the same if their thumbnails are alike and their 64-bit perceptual hashes differ in at most
    so many bits. A record is dropped if all its images are in earlier records, so leave this unset for a dataset with
    several conversations about one image."""
    text_similarity: float | None = Field(default=None, ge=0.5, le=1)
    """Two texts count as the same if the Jaccard similarity of their word 5-grams, estimated by MinHash, is at least
    this. Short texts of records with images are not compared: captions and questions recur with other images."""

    @model_validator(mode="after")
    def _compare_something(self) -> "NearDuplicates":
        if self.image_bits is None and self.text_similarity is None:
            raise ValueError("near_duplicates compares nothing; set image_bits, text_similarity or both")
        return self
