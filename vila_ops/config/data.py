"""What data is: pinned packages, sources, and weighted mixtures of them."""

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from vila_ops.config.base import Config, Slug

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Rendering = Literal["caption", "document", "questions", "instructions", "definition"]
"""What a source's records become: image + caption, an interleaved document, visual questions, text-only turns, or a
word with its meaning."""


class Package(Config):
    """One file of a package registry, pinned by version and sha256; fetched by that registry's ordinary client."""

    registry: Literal["pypi", "debian", "npm"]
    name: str
    version: str
    sha256: Sha256
    """Of the file that the client downloads: wheel, .deb or .tgz."""
    licence: str
    """As the package states it, in SPDX terms where they exist; copied to the data card."""


class SourceBase(Config):
    """What every source has."""

    weight: PositiveFloat = 1.0
    """Share of the epoch's samples, relative to the other weights of the mixture."""
    render: Rendering
    limit: PositiveInt | None = None
    """Take only so many keys, evenly spaced in key order; None takes all."""

    def origin(self) -> dict[str, Any]:
        """What is read, whatever is made of it."""
        return self.model_dump(exclude={"weight", "render", "limit"})


class TuxPaint(SourceBase):
    """Tux Paint stamps: photo cut-outs and drawings with one human sentence each."""

    kind: Literal["tux_paint"] = "tux_paint"
    package: Package


class FluentEmoji(SourceBase):
    """Microsoft's Fluent emoji, 3-D renders, with their CLDR short names."""

    kind: Literal["fluent_emoji"] = "fluent_emoji"
    package: Package
    names: Package
    """The package with the CLDR names and groups (emojibase-data)."""


class GimpHelp(SourceBase):
    """The GIMP manual: interleaved documents of text and figures."""

    kind: Literal["gimp_help"] = "gimp_help"
    package: Package


class GCompris(SourceBase):
    """GCompris boards: titles and encyclopedic paragraphs, with the photo they belong to where the package has it."""

    kind: Literal["gcompris"] = "gcompris"
    package: Package


class WordNet(SourceBase):
    """WordNet 3.0 nouns with their glosses; text only."""

    kind: Literal["wordnet"] = "wordnet"
    package: Package


class GnomeHelp(SourceBase):
    """GNOME's user help: a question-like title and the steps that answer it; text only."""

    kind: Literal["gnome_help"] = "gnome_help"
    package: Package


class JsonLines(SourceBase):
    """A folder with `records.jsonl` in our own record layout and the pictures it names (see data/sources/jsonl.py)."""

    kind: Literal["jsonl"] = "jsonl"
    path: str
    """Folder, relative to the working directory; its content, not its place, is what is hashed."""


Source = Annotated[
    TuxPaint | FluentEmoji | GimpHelp | GCompris | WordNet | GnomeHelp | JsonLines, Field(discriminator="kind")
]


class Split(Config):
    """Train / validation / test by object name, so that an object never stands on both sides."""

    salt: str = "vila-ops"
    validation: float = Field(default=0.1, gt=0, lt=0.5)
    test: float = Field(default=0.1, gt=0, lt=0.5)


class Mixture(Config):
    """Sources blended by weight."""

    name: Slug
    sources: dict[str, Source] = Field(min_length=1)
    split: Split = Split()
    max_bad_share: float = Field(default=0.05, ge=0, le=1)
    """Stop when more than this share of a source's records had to be dropped as bad."""
    long_documents: Literal["truncate", "split"] = "truncate"
    """What becomes of a document longer than max_tokens; the recipe truncates. A picture is never cut either way."""
    shard_records: PositiveInt = 256
    """Source keys per shard: the unit of parallel work."""
    seed: int = 0
    """Of everything drawn while rendering (questions, distractors)."""
