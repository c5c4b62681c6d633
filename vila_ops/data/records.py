"""The record layout that every source produces: turns of text and image parts, in order."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Role = Literal["document", "system", "user", "assistant"]
"""A `document` is plain running text; all its text tokens are target tokens."""


@dataclass(frozen=True)
class Image:
    """One image as the encoded bytes of its file (PNG, WebP, JPEG, ...)."""

    data: bytes
    scores: Mapping[str, float] = field(default_factory=dict)
    """Score columns of the source for this image, such as the similarity to its sentence."""


Part = str | Image


@dataclass(frozen=True)
class Turn:
    """One message: text and images in their order."""

    role: Role
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Record:
    """One document, captioned image or conversation, before it is tokenised."""

    id: str
    """Unique within its source."""
    object: str
    """What the record is about, lower case: the key of the train / validation / test split."""
    turns: tuple[Turn, ...]
    category: str
    """Group of the object within its source ("animals/birds"); empty if the source has no groups."""
    licence: str
    provenance: str
    """Where the record comes from: package, version and path inside it, or file and line."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Score columns of the source that filtering reads, such as clip_similarity_vitb32."""
    notes: tuple[str, ...] = ()
    """Reasons of `CHANGES` by which the record is counted: where it differs from its raw form."""


FIRST_ANSWER, EMPTY_SYSTEM, CONTROL_TOKEN = "first_turn_of_assistant", "empty_system_turn", "control_token"
TRUNCATED_IMAGE, MISSING_IMAGE = "truncated_image", "missing_image_left_out"
CHANGES = {
    FIRST_ANSWER: "the assistant's turn before the first question is left out, as LLaVA and VILA do",
    EMPTY_SYSTEM: "a system turn without text is left out",
    CONTROL_TOKEN: "text that spells a control token of the tokenizer is written in the other case",
    TRUNCATED_IMAGE: "a JPEG without its end is read with grey in place of what is missing, as VILA does",
    MISSING_IMAGE: "an image that was not downloaded, or cannot be read, is left out of its document",
}
"""Changes to records that are kept, by the reason under which they are counted."""

NOT_DOWNLOADED = "not_downloaded"
"""Reason of records whose image could not be downloaded; they do not count as bad."""


@dataclass(frozen=True)
class Dropped:
    """A record that cannot be used, and the reason; it is counted and never replaced by another record."""

    id: str
    reason: str
    """A fixed identifier ("no_image", "no_text", ...), by which drops are counted."""
    where: str = ""
    """File, and line or row in it from 1: "docs/a.jsonl:17"."""
    detail: str = ""
    """The value, the rule and the way out."""
    is_bad: bool = True
    """Whether it counts against max_bad_share. A record that a rule drops, or whose image is not there, does not."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Score columns, with which the record takes part in the ranking of its file."""
