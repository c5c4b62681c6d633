"""What a source of data is: one class a format, and where its records come from."""

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, SerializeAsAny, model_validator

from vila_ops.config.base import Config
from vila_ops.config.clean import Clean
from vila_ops.config.kinds import plugins
from vila_ops.config.package import Package

Rendering = Literal["caption", "document", "questions", "conversation", "instructions", "definition"]
"""What a source's records become: image + caption, an interleaved document, visual questions made of a caption, turns
with images, text-only turns, or a word with its meaning."""


class SourceBase(Config):
    """What every source has."""

    weight: PositiveFloat | None = None
    """Share of an epoch, relative to the other sources' weights (blend `weight`; None counts as 1)."""
    repeats: PositiveFloat | None = None
    """How often an epoch sees each sample (blend `repeats`; None counts as 1)."""
    render: Rendering
    limit: PositiveInt | None = None
    """Take only so many records, evenly spaced in their order; None takes all."""
    clean: Clean = Clean()

    def packages(self) -> tuple[Package, ...]:
        """The packages to fetch before the source can be read, in the order of its fields; empty for files."""
        values = (getattr(self, name) for name in type(self).model_fields)
        return tuple(value for value in values if isinstance(value, Package))

    def origin(self) -> dict[str, Any]:
        """What is read, whatever is made of it."""
        return self.model_dump(exclude={"weight", "repeats", "render", "limit", "clean"})


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


class OwnFiles(SourceBase):
    """What sources of one's own files have."""

    path: str
    """File, or folder whose files of the format are read in the order of their names, relative to the working
    directory. The content, not the place, is what is hashed."""
    licence: str
    """Of the records that state none, in SPDX terms where they exist."""


class JsonLines(SourceBase):
    """A folder with `records.jsonl` in our own record layout and the images it names (see data/sources/jsonl.py)."""

    kind: Literal["jsonl"] = "jsonl"
    path: str
    """Folder, relative to the working directory; its content, not its place, is what is hashed."""


class Llava(OwnFiles):
    """LLaVA's conversation JSON: a list of {id, image, conversations}, or one a line; no image, one, or a list."""

    kind: Literal["llava"] = "llava"
    images: str | None = None
    """Folder that the image paths are relative to; None where no record has an image."""
    render: Literal["conversation", "caption"] = "conversation"
    """caption is LLaVA's `plain`: the image and the answer, the question left out."""


class LlavaCc3m(OwnFiles):
    """LLaVA-CC3M-Pretrain-595K: a folder with chat.json and metadata.json, and its images."""

    kind: Literal["llava_cc3m"] = "llava_cc3m"
    images: str
    """Folder of the images."""
    render: Literal["conversation", "caption"] = "caption"


class Mmc4(OwnFiles):
    """Multimodal C4: jsonl shards of documents, with the images that `vila-ops data download` brought."""

    kind: Literal["mmc4"] = "mmc4"
    images: str
    """Folder of the downloaded tars and manifests, one pair a shard."""
    render: Literal["document"] = "document"
    order: Literal["interleaved", "pairs", "image_first"] = "interleaved"
    """The recipe, or what the paper compares it with: one sample an image with its sentence, or all images first."""
    max_images: PositiveInt = 6
    """The first so many of a document, in the order of the file."""
    missing_images: Literal["drop_document", "drop_image"] = "drop_document"
    """What one image that could not be had costs; the recipe keeps only documents that have all of theirs."""
    min_similarity: float | None = None
    """Of an image to its sentence (CLIP); an image below it is left out."""


class Coyo(OwnFiles):
    """COYO-700M: parquet shards of image addresses, alt texts and scores, with the images that were downloaded."""

    kind: Literal["coyo"] = "coyo"
    images: str
    """Folder of the downloaded tars and manifests, one pair a shard."""
    render: Literal["caption"] = "caption"


class Flan(OwnFiles):
    """FLAN's text-only instructions: parquet or jsonl with `inputs` and `targets`."""

    kind: Literal["flan"] = "flan"
    render: Literal["instructions"] = "instructions"


class Vflan(OwnFiles):
    """Visual instructions with images as base64: jsonl of M3IT (instruction, inputs, outputs) or of VFLAN (question,
    answer)."""

    kind: Literal["vflan"] = "vflan"
    images: str | None = None
    """Folder that images which are paths and not base64 are relative to; None where there are none."""
    render: Literal["conversation"] = "conversation"
    max_images: PositiveInt = 8
    """A record with more images is dropped."""


class Messages(OwnFiles):
    """OpenAI chat messages, one conversation a line of jsonl; images as data: addresses or as files."""

    kind: Literal["messages"] = "messages"
    images: str | None = None
    """Folder that file paths in image_url are relative to; None: only data: addresses."""
    render: Literal["conversation"] = "conversation"


class WebDataset(OwnFiles):
    """WebDataset tars: members KEY.jpg (png, webp, ...) and KEY.txt, or KEY.json with a caption or conversations."""

    kind: Literal["webdataset"] = "webdataset"
    render: Literal["caption", "conversation"] = "caption"


class HfParquet(OwnFiles):
    """Parquet shards of a Hugging Face data set: images in the rows, as its Image feature stores them."""

    kind: Literal["hf_parquet"] = "hf_parquet"
    image: str = "image"
    """Column of an image or of a list of images."""
    text: str = "text"
    """Column of the caption, or of the conversation where render is conversation."""
    render: Literal["caption", "conversation"] = "caption"


class Html(OwnFiles):
    """A folder of HTML pages and the images that they show: interleaved documents."""

    kind: Literal["html"] = "html"
    render: Literal["document"] = "document"
    missing_images: Literal["drop_document", "drop_image"] = "drop_document"
    """What one image costs that is on another host, or not there, or none."""


class Table(OwnFiles):
    """A CSV or TSV with a header, a line an image: its file and its caption, or a question and an answer."""

    kind: Literal["table"] = "table"
    images: str
    """Folder that the image column's paths are relative to."""
    image: str = "image"
    text: str = "text"
    """Column of the caption, or of the answer where `question` is set."""
    question: str | None = None
    """Column of the question; then the records are conversations."""
    render: Literal["caption", "conversation"] = "caption"

    @model_validator(mode="after")
    def _question_and_conversation(self) -> "Table":
        if (self.question is None) != (self.render == "caption"):
            raise ValueError("question and render conversation need each other; set both, or neither")
        return self


OwnSource = (
    TuxPaint
    | FluentEmoji
    | GimpHelp
    | GCompris
    | WordNet
    | GnomeHelp
    | JsonLines
    | Llava
    | LlavaCc3m
    | Mmc4
    | Coyo
    | Flan
    | Vflan
    | Messages
    | WebDataset
    | HfParquet
    | Html
    | Table
)
Source = Annotated[OwnSource, Field(discriminator="kind"), SerializeAsAny(), plugins("vila_ops.sources", OwnSource)]
