"""Weighted mixtures of sources, and their split."""

import operator
from collections import Counter
from typing import Annotated, Any, Literal, assert_never

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from vila_ops.config.base import Config, Slug
from vila_ops.config.clean import MAX_IMAGE_BITS, NearDuplicates
from vila_ops.config.images import ImageStorage
from vila_ops.config.sources import Source

RecordIds = Annotated[tuple[str, ...], Field(min_length=1)]
ALL = "all"
"""In place of a removal: the whole source."""
Removal = Annotated[str, Field(pattern=r"(?s)^(id=.+|licence=.*|all)$")]
Removals = Annotated[tuple[Removal, ...], Field(min_length=1)]


class Split(Config):
    """Train / validation / test by a hash of the object name, so that an object is in one split only."""

    salt: str = "vila-ops"
    validation: float = Field(default=0.1, gt=0, lt=0.5)
    test: float = Field(default=0.1, gt=0, lt=0.5)


class ByWeight(Config):
    """Each source's share of an epoch is given by its `weight`."""

    kind: Literal["weight"] = "weight"
    unit: Literal["samples", "tokens"] = "samples"
    """Whether weights are shares of the samples or of the tokens of an epoch."""


class BySize(Config):
    """Each source's share of an epoch is proportional to its size to the power 1 / temperature."""

    kind: Literal["size"] = "size"
    unit: Literal["samples", "tokens"] = "samples"
    temperature: PositiveFloat = 1.0
    """1: shares proportional to size; higher: more equal shares."""


class ByRepeats(Config):
    """Each sample of a source is used `repeats` times in an epoch."""

    kind: Literal["repeats"] = "repeats"


Blend = Annotated[ByWeight | BySize | ByRepeats, Field(discriminator="kind")]


class Contamination(Config):
    """Drop training records that share an image or an n-gram of words with an evaluation set."""

    sources: dict[str, Source] = Field(min_length=1)
    """The evaluation sets."""
    image_bits: int = Field(default=6, ge=0, le=MAX_IMAGE_BITS)
    """Two images count as the same if their thumbnails are alike and their 64-bit perceptual hashes differ in at most
    so many bits."""
    ngram_words: PositiveInt = 13
    """A text that shares so many consecutive words with an evaluation text is contaminated (13 as for GPT-3). A shorter
    evaluation text is compared as a whole if it has no image; if it has one, only the image is compared."""


class Mixture(Config):
    """Sources blended into one set of samples."""

    name: Slug
    sources: dict[Slug, Source] = Field(min_length=1)
    split: Split = Split()
    blend: Blend = ByWeight()
    images: ImageStorage = ImageStorage()
    quarantine: dict[Slug, RecordIds] = Field(default={}, exclude_if=operator.not_)
    """By source, the ids of records to leave out, such as those that broke a training step. The samples of the other
    records do not change. `vila-ops data quarantine` writes the ids into a separate file."""
    removed: dict[Slug, Removals] = Field(default={}, exclude_if=operator.not_)
    """By source, what was taken down: `id=ID` a record, `licence=LICENCE` all records of a licence, those of later raw
    files too, `all` the whole source. Unlike quarantined records they are in no shard. `vila-ops data remove` writes it
    into a separate file."""
    near_duplicates: NearDuplicates | None = None
    contamination: Contamination | None = None
    max_bad_share: float = Field(default=0.05, ge=0, le=1)
    """Stop if more than this share of a source's records is bad. Records that a rule of `clean`, `near_duplicates` or
    `contamination` drops are not bad, nor are those whose image could not be downloaded."""
    long_documents: Literal["truncate", "split"] = "truncate"
    """What to do with a document longer than max_tokens; the paper's recipe truncates. An image is never cut."""
    shard_bytes: PositiveInt = 128 * 2**20
    """Target size of a shard, which is the unit of parallel work and of reuse. 64 to 256 MiB suits disks and S3."""
    seed: int = 0
    """Seed of everything drawn while rendering (questions, distractors)."""

    @model_validator(mode="before")
    @classmethod
    def _a_source_of_share_0_is_left_out(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not isinstance(value.get("sources"), dict):
            return value
        blend, sources = value.get("blend"), value["sources"]
        kind = blend.get("kind", "weight") if isinstance(blend, dict) else getattr(blend, "kind", "weight")
        share = {"weight": "weight", "repeats": "repeats"}.get(str(kind))
        idle = {name for name, source in sources.items() if isinstance(source, dict) and _is_zero(source.get(share))}
        removed = value.get("removed")
        if isinstance(removed, dict):
            idle |= {name for name, removals in removed.items() if name in sources and ALL in removals}
        if idle and len(idle) == len(sources):
            raise ValueError(
                f"every source has {share} 0 or is removed, so an epoch would have no samples; give one of them a share"
            )
        kept = {
            key: {name: one for name, one in value[key].items() if name not in idle}
            for key in ("sources", "quarantine", "removed")
            if isinstance(value.get(key), dict)
        }
        return {**value, **kept}

    @model_validator(mode="after")
    def _what_is_left_out_is_of_a_source(self) -> "Mixture":
        for setting, named in (("quarantine", self.quarantine), ("removed", self.removed)):
            if unknown := [name for name in named if name not in self.sources]:
                raise ValueError(
                    f"mixture {self.name!r}: {setting} names {unknown}, which are no sources of it; "
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


def _is_zero(share: object) -> bool:
    return type(share) in (int, float) and share == 0
