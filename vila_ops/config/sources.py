"""Sources of data: one config class for each format."""

import operator
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, SerializeAsAny, model_validator

from vila_ops.config.base import Config
from vila_ops.config.clean import Clean
from vila_ops.config.kinds import plugins
from vila_ops.config.package import Package

Rendering = Literal["caption", "document", "questions", "conversation", "instructions", "definition"]
"""What records are rendered as: an image with its caption, an interleaved document, visual questions made from a
caption, turns with images, text-only turns, or a word with its definition."""

DocumentOrder = Literal["interleaved", "pairs", "image_first"]
"""How a document's text and images become samples."""


class SourceBase(Config):
    """The settings of every source."""

    weight: PositiveFloat | None = None
    """Share of an epoch, relative to the other sources' weights (blend `weight`; None counts as 1; with 0 the source is
    left out, as if it were not there)."""
    repeats: PositiveFloat | None = None
    """How often each sample is used in an epoch (blend `repeats`; None counts as 1; with 0 the source is left out)."""
    render: Rendering
    limit: PositiveInt | None = None
    """Number of records to take, evenly spaced in their order; None takes all."""
    clean: Clean = Clean()

    def packages(self) -> tuple[Package, ...]:
        """The packages to fetch before the source can be read, in the order of its fields; empty for files."""
        values = (getattr(self, name) for name in type(self).model_fields)
        return tuple(value for value in values if isinstance(value, Package))

    def origin(self) -> dict[str, Any]:
        """The settings that say what is read, without those that say how it is used."""
        return self.model_dump(exclude={"weight", "repeats", "render", "limit", "clean"})


class TuxPaint(SourceBase):
    """Tux Paint stamps: photo cut-outs and drawings, each with one human-written sentence."""

    kind: Literal["tux_paint"] = "tux_paint"
    package: Package


class FluentEmoji(SourceBase):
    """Microsoft's Fluent emoji, 3-D renders, with their CLDR short names."""

    kind: Literal["fluent_emoji"] = "fluent_emoji"
    package: Package
    names: Package
    """The package with the CLDR names and groups (emojibase-data)."""


class EmojiDatasource(SourceBase):
    """Emoji in the flat style of one vendor, 64 pixels wide, with their CLDR short names."""

    kind: Literal["emoji_datasource"] = "emoji_datasource"
    package: Package
    """A package emoji-datasource-VENDOR."""
    names: Package
    """The package with the CLDR names and groups (emojibase-data), by which an emoji is one object in every style."""


class GimpHelp(SourceBase):
    """The GIMP manual: interleaved documents of text and figures."""

    kind: Literal["gimp_help"] = "gimp_help"
    package: Package
    order: DocumentOrder = Field(default="interleaved", exclude_if=lambda order: order == "interleaved")
    """As for MMC4; a figure's sentence is the line before it, which is its title if it has one."""


class GCompris(SourceBase):
    """GCompris boards: titles and encyclopedic paragraphs, with their photo if the package has it."""

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
    """The settings of every source that reads files."""

    path: str
    """A file, or a folder whose files of the format are read in the order of their names; relative to the working
    directory, or s3://BUCKET/FOLDER. The address of a dataset depends on the content of the files, not on their
    path."""
    licence: str
    """Licence of the records that state none, as an SPDX identifier if there is one."""


class JsonLines(SourceBase):
    """A folder with `records.jsonl` in our own record layout and the images it names (see data/sources/jsonl.py)."""

    kind: Literal["jsonl"] = "jsonl"
    path: str
    """Folder, relative to the working directory. The address of a dataset depends on its content, not on its path."""


class OwnRecords(OwnFiles):
    """The settings of every source whose records are objects or rows with keys of their own."""

    ignore: tuple[str, ...] = Field(default=(), exclude_if=operator.not_)
    """Keys (columns) whose images, videos, sound, tools or preferred answers are left out on purpose. A record with
    these under any other key that the source does not read is dropped."""


Placement = Literal["as_written", "vila"]
"""as_written: an image stays where its `<image>` is, with the white space around it. vila, as in VILA's loader: the
only image of a turn comes before its text; several stay where they are; each is followed by one newline; images without
any `<image>` come before the first question."""


class Llava(OwnRecords):
    """LLaVA's conversation JSON: a list of {id, image, conversations}, or one on each line. Images are a path or a
    list of paths under `image` or `images`, or absent."""

    kind: Literal["llava"] = "llava"
    images: str | None = None
    """Folder that the image paths are relative to; None if no record has an image."""
    render: Literal["conversation", "caption"] = "conversation"
    """caption is LLaVA's `plain`: the image and the answer, without the question."""
    placement: Placement = "as_written"

    @model_validator(mode="after")
    def _placement_has_an_effect(self) -> "Llava":
        if self.render == "caption" and self.placement == "vila":
            raise ValueError("placement has no effect with render caption, which begins with the image; remove it")
        return self


class LlavaCc3m(OwnRecords):
    """LLaVA-CC3M-Pretrain-595K: a folder with chat.json and metadata.json, and its images."""

    kind: Literal["llava_cc3m"] = "llava_cc3m"
    images: str
    """Folder of the images."""
    render: Literal["conversation", "caption"] = "caption"


class Mmc4(OwnFiles):
    """Multimodal C4: jsonl shards of documents, with the images that `vila-ops data download` fetched."""

    kind: Literal["mmc4"] = "mmc4"
    images: str
    """Folder of the downloaded tars and manifests, one of each for every shard."""
    render: Literal["document"] = "document"
    order: DocumentOrder = "interleaved"
    """interleaved is the paper's recipe; it is compared with pairs (a sample for each image with its sentence) and
    image_first (all images before the text)."""
    max_images: PositiveInt = 6
    """Only the first images of a document are used, in the order of the file."""
    missing_images: Literal["drop_document", "drop_image"] = "drop_document"
    """What to drop if an image could not be downloaded; the paper's recipe keeps only documents with all images."""
    min_similarity: float | None = None
    """CLIP similarity of an image to its sentence; an image below it is left out."""


class Coyo(OwnFiles):
    """COYO-700M: Parquet shards of image URLs, alt texts and scores, with the images that `vila-ops data download`
    fetched."""

    kind: Literal["coyo"] = "coyo"
    images: str
    """Folder of the downloaded tars and manifests, one of each for every shard."""
    render: Literal["caption"] = "caption"


class Interleaved(OwnFiles):
    """Interleaved documents as OBELICS (Parquet) and OmniCorpus (jsonl) have them: a list of texts and one of image
    URLs, with null in one of them at each place; `vila-ops data download` fetches the images."""

    kind: Literal["interleaved"] = "interleaved"
    images: str
    """Folder of the downloaded tars and manifests, one of each for every raw file."""
    render: Literal["document"] = "document"
    max_images: PositiveInt | None = None
    """Only the first images of a document are used; None: all."""
    missing_images: Literal["drop_document", "drop_image"] = "drop_image"
    """What to drop if an image could not be downloaded. Few documents have all of their many images still online."""


class Flan(OwnRecords):
    """FLAN's text-only instructions: Parquet or jsonl with `inputs` and `targets`."""

    kind: Literal["flan"] = "flan"
    render: Literal["instructions"] = "instructions"


class Vflan(OwnRecords):
    """Visual instructions with images as base64: jsonl of M3IT (instruction, inputs, outputs) or of VFLAN (question,
    answer)."""

    kind: Literal["vflan"] = "vflan"
    images: str | None = None
    """Folder that images given as paths are relative to; None if all images are base64."""
    render: Literal["conversation"] = "conversation"
    max_images: PositiveInt = 8
    """A record with more images is dropped."""


class Messages(OwnRecords):
    """Chat messages, one conversation on each line of jsonl, with images as parts of messages or under `images`."""

    kind: Literal["messages"] = "messages"
    images: str | None = None
    """Folder that the images' paths are relative to; None if all images are data: URLs."""
    render: Literal["conversation"] = "conversation"


class WebDataset(OwnRecords):
    """WebDataset tars: members KEY.jpg (png, webp, ...) and KEY.txt, or KEY.json with a caption or conversations."""

    kind: Literal["webdataset"] = "webdataset"
    render: Literal["caption", "conversation"] = "caption"
    image_members: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Suffixes of the members that are a record's images, in their order, such as [left.png, right.png]. None: KEY.jpg,
    KEY.0.jpg, KEY.1.jpg, ...; a companion such as KEY.seg.png is no image then."""
    text_member: str = "txt"
    """Suffix of the member with the caption, such as outputs.txt."""
    key_ends: Literal["first_dot", "last_dot"] = "first_dot"
    """Where the key of a member ends: IMG for IMG.0001.jpg, as in the webdataset library, or IMG.0001."""


class HfParquet(OwnRecords):
    """Parquet shards of a Hugging Face dataset: images in the rows, as its Image feature stores them."""

    kind: Literal["hf_parquet"] = "hf_parquet"
    image: str = "image"
    """Column with an image or a list of images."""
    text: str = "text"
    """Column with the caption, or with the conversation if render is conversation."""
    render: Literal["caption", "conversation"] = "caption"


class Html(OwnFiles):
    """A folder of HTML pages and their images: interleaved documents."""

    kind: Literal["html"] = "html"
    render: Literal["document"] = "document"
    missing_images: Literal["drop_document", "drop_image"] = "drop_document"
    """What to drop if an image is on another host, is missing, or cannot be decoded."""


Separator = Literal["comma", "tab", "semicolon", "pipe"]


class Table(OwnFiles):
    """A CSV or TSV, or another table of text; each row has an image and its caption, or a question and an answer."""

    kind: Literal["table"] = "table"
    images: str
    """Folder that the image column's paths are relative to; with `image_url` that of the downloaded tars."""
    separator: Separator | None = None
    """Character between two columns; None: a comma in a .csv, a tab in a .tsv."""
    quotes: bool | None = None
    """Whether fields may stand in double quotes. None: yes, unless tabs separate them, since a TSV has no quotes; one
    that pandas wrote has."""
    columns: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Names of the columns; None: the first row has them."""
    image: str = "image"
    """Column with the image's file name. A number that follows it, as in Flickr30k's 1000092795.jpg#0, is ignored."""
    image_url: str | None = None
    """Column with the image's URL, in place of `image`; `vila-ops data download` fetches the images."""
    text: str = "text"
    """Column with the caption, or with the answer if `question` is set."""
    question: str | None = None
    """Column with the question; if set, the records are conversations."""
    render: Literal["caption", "conversation"] = "caption"

    @model_validator(mode="after")
    def _question_and_conversation(self) -> "Table":
        if self.columns is not None and len(set(self.columns)) < len(self.columns):
            raise ValueError(f"columns names a column twice: {list(self.columns)}")
        if (self.question is None) != (self.render == "caption"):
            raise ValueError("question and render conversation need each other; set both, or neither")
        return self


OwnSource = (
    TuxPaint
    | FluentEmoji
    | EmojiDatasource
    | GimpHelp
    | GCompris
    | WordNet
    | GnomeHelp
    | JsonLines
    | Llava
    | LlavaCc3m
    | Mmc4
    | Coyo
    | Interleaved
    | Flan
    | Vflan
    | Messages
    | WebDataset
    | HfParquet
    | Html
    | Table
)
Source = Annotated[OwnSource, Field(discriminator="kind"), SerializeAsAny(), plugins("vila_ops.sources", OwnSource)]
