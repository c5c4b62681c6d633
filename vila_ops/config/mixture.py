"""Weighted mixtures of sources, and their split."""

import operator
from collections import Counter
from typing import Annotated, Literal, assert_never

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from vila_ops.config.base import Config, Slug
from vila_ops.config.clean import MAX_IMAGE_BITS, NearDuplicates
from vila_ops.config.images import Decoding, ImageEncoding, Webp
from vila_ops.config.sources import Source

RecordIds = Annotated[tuple[str, ...], Field(min_length=1)]


class Split(Config):
    """Train / validation / test by object name, so that an object never stands on both sides."""

    salt: str = "vila-ops"
    validation: float = Field(default=0.1, gt=0, lt=0.5)
    test: float = Field(default=0.1, gt=0, lt=0.5)


class ByWeight(Config):
    """Each source has the share of an epoch that its `weight` says."""

    kind: Literal["weight"] = "weight"
    unit: Literal["samples", "tokens"] = "samples"
    """What is shared. By tokens, a source of long documents gets as many tokens, not samples, as its weight says."""


class BySize(Config):
    """Each source has a share proportional to its size to the power 1 / temperature."""

    kind: Literal["size"] = "size"
    unit: Literal["samples", "tokens"] = "samples"
    temperature: PositiveFloat = 1.0
    """1: as large as it is; higher: more equal."""


class ByRepeats(Config):
    """Each source is seen `repeats` times in an epoch."""

    kind: Literal["repeats"] = "repeats"


Blend = Annotated[ByWeight | BySize | ByRepeats, Field(discriminator="kind")]


class Contamination(Config):
    """A gate: training records that show or say what an evaluation set asks are dropped."""

    sources: dict[str, Source] = Field(min_length=1)
    """The evaluation sets."""
    image_bits: int = Field(default=6, ge=0, le=MAX_IMAGE_BITS)
    """Images that look alike and whose 64-bit perceptual hashes differ in at most so many bits are one image."""
    ngram_words: PositiveInt = 13
    """A text that shares a run of so many words with an evaluation text is contaminated (13 as for GPT-3). A shorter
    evaluation text without an image is searched as a whole text; one with an image is known by its image alone."""


class ImageStorage(Config):
    """How images are kept in a shard: as squares of the size that the model sees."""

    encoding: ImageEncoding = Webp()
    decode: Decoding = "exact"


class Mixture(Config):
    """Sources blended into one set of samples."""

    name: Slug
    sources: dict[Slug, Source] = Field(min_length=1)
    split: Split = Split()
    blend: Blend = ByWeight()
    images: ImageStorage = ImageStorage()
    quarantine: dict[Slug, RecordIds] = Field(default={}, exclude_if=operator.not_)
    """By source, the ids of records that are left out, such as those that broke a training step. What is made of the
    others stays byte for byte. `vila-ops data quarantine` writes them into a file of their own."""
    near_duplicates: NearDuplicates | None = None
    contamination: Contamination | None = None
    max_bad_share: float = Field(default=0.05, ge=0, le=1)
    """Stop when more than this share of a source's records had to be dropped as bad. What a rule of `clean`,
    `near_duplicates` or `contamination` takes out is not bad, nor is an image that could not be downloaded."""
    long_documents: Literal["truncate", "split"] = "truncate"
    """What becomes of a document longer than max_tokens; the recipe truncates. An image is never cut either way."""
    shard_bytes: PositiveInt = 128 * 2**20
    """What a shard aims at; the unit of parallel work and of reuse. Shards of 64 to 256 MiB suit disks and S3 best."""
    seed: int = 0
    """Of everything drawn while rendering (questions, distractors)."""

    @model_validator(mode="after")
    def _quarantine_has_an_effect(self) -> "Mixture":
        if unknown := [name for name in self.quarantine if name not in self.sources]:
            raise ValueError(
                f"mixture {self.name!r}: quarantine names {unknown}, which are no sources of it; "
                f"those are {list(self.sources)}"
            )
        for name, ids in self.quarantine.items():
            if twice := [one for one, count in Counter(ids).items() if count > 1]:
                raise ValueError(f"mixture {self.name!r}: quarantine names {twice} of {name!r} twice")
        return self

    @model_validator(mode="after")
    def _every_share_has_an_effect(self) -> "Mixture":
        match self.blend:
            case ByWeight():
                idle = "repeats"
            case ByRepeats():
                idle = "weight"
            case BySize():
                idle = "weight" if any(source.weight for source in self.sources.values()) else "repeats"
            case _:
                assert_never(self.blend)
        if names := [name for name, source in self.sources.items() if getattr(source, idle) is not None]:
            raise ValueError(
                f"mixture {self.name!r}: sources {names} set {idle}, which has no effect in a blend by "
                f"{self.blend.kind}; remove it or choose another blend"
            )
        return self
