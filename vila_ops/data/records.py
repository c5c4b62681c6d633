"""The one record layout behind every source: turns of text and image parts, in order."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Role = Literal["document", "system", "user", "assistant"]
"""A document is plain running text, every token of which is learnt."""


@dataclass(frozen=True)
class Image:
    """One image as the encoded bytes of its file (PNG, WebP, JPEG, ...)."""

    data: bytes
    scores: Mapping[str, float] = field(default_factory=dict)
    """Columns of the source about this image, such as the similarity to its sentence."""


Part = str | Image


@dataclass(frozen=True)
class Turn:
    """What one side says: text and images in their order."""

    role: Role
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Record:
    """One document, captioned image or conversation, before it is tokenised."""

    id: str
    """Unique inside its source."""
    object: str
    """What it shows or speaks of, lower case: the key of the train / validation / test split."""
    turns: tuple[Turn, ...]
    category: str
    """Group of the object inside its source ("animals/birds"); empty where the source has none."""
    licence: str
    provenance: str
    """Where it came from: package, version and path inside it."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Columns of the source that cleaning reads, such as clip_similarity_vitb32."""


NOT_DOWNLOADED = "not_downloaded"
"""Reason of records whose image is gone from the web: a fact about the web, not a fault of the data."""


@dataclass(frozen=True)
class Dropped:
    """A record that cannot be used, and why; counted, never replaced by another."""

    id: str
    reason: str
    """A short fixed word ("unreadable_image", "no_text", ...): drops are counted by it."""
    where: str = ""
    """File, and line or row in it (from 1), so that what was dropped can be found: "docs/a.jsonl:17"."""
    detail: str = ""
    """The value, the rule and the way out, for a person."""
