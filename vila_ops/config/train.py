"""Settings of a training stage: trained parts, data, length and rates."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from vila_ops.config.base import Config
from vila_ops.config.mixture import Mixture
from vila_ops.config.model import Component


class FullTuning(Config):
    """Train every weight of the language model."""

    kind: Literal["full"] = "full"


class Lora(Config):
    """Train low-rank adapters on every linear layer of the language model except the head.

    The checkpoint holds the merged model, and the adapter beside it.
    """

    kind: Literal["lora"] = "lora"
    rank: PositiveInt = 64
    alpha: PositiveFloat = 16.0
    """Adapters are scaled by alpha / rank (NVlabs' default: 16 at rank 64)."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    quantise: Literal["nf4"] | None = None
    """Keep the frozen weights in 4 bits during training (QLoRA); needs bitsandbytes."""


class VisualExpert(Config):
    """Train a second set of QKV and FFN weights for image tokens; the language model's own stay frozen.

    The paper's Table 8, after CogVLM. It starts as a copy, and later stages keep it.
    """

    kind: Literal["visual_expert"] = "visual_expert"


Tuning = Annotated[FullTuning | Lora | VisualExpert, Field(discriminator="kind")]


class Stage(Config):
    """One training stage. Its settings change the numbers; settings that only change the speed are in Resources."""

    name: str
    mixture: Mixture
    trainable: tuple[Component, ...] = Field(min_length=1)
    tuning: Tuning = FullTuning()
    """How the language model is trained, if it is."""
    projector_fit: Literal["scale", "least_squares"] = Field(default="scale", exclude_if=lambda fit: fit == "scale")
    """First weights of a projector that no stage has trained. scale: drawn ones, with inputs and outputs scaled.
    least_squares: the last layer solved so that each image token predicts the mean embedding of the words after the
    image, over the first 4,096 images of the stage."""
    image_size: PositiveInt | None = None
    """Side of the square image in pixels from this stage on; None: as before. Tower positions are interpolated."""
    num_steps: PositiveInt | None = None
    """Number of optimizer steps; give either this or `epochs`."""
    epochs: PositiveFloat | None = None
    """Number of passes over the mixture. The first rows of the next pass complete the last global batch."""
    global_batch_size: PositiveInt
    """Packed sequences per optimizer step, over all workers and micro-batches; samples without packing."""
    pack: bool = True
    """Pack as many samples into a sequence as fit. False: one sample per sequence, as in the paper's runs."""
    sequence_length: PositiveInt
    """Length of a packed sequence in tokens, image tokens included; without packing the longest sequence."""
    learning_rate: PositiveFloat
    """Peak rate of each component that is not in `learning_rates`."""
    learning_rates: dict[Component, PositiveFloat] = {}
    """Peak rates of single components."""
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    final_ratio: float = Field(default=0.0, ge=0, le=1)
    """Final learning rate as a share of the peak rate."""
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: PositiveFloat | None = 1.0
    """Global norm to which the gradient is clipped; None: it is not clipped."""
    precision: Literal["fp32", "bf16"]
    """Precision of weights and activations. Master weights, moments and checkpoints are always fp32."""
    save_every: PositiveInt
    """Steps between resume checkpoints."""
    validate_every: PositiveInt
    """Steps between validations. The stage also validates before its first and after its last step."""
    validation_rows: PositiveInt = 16
    """Sequences of the validation split that a validation reads."""
    seed: int = 0
    """Seed of the sample order."""

    @model_validator(mode="after")
    def _its_length_is_given_once(self) -> "Stage":
        if (self.num_steps is None) == (self.epochs is None):
            given = "neither is" if self.num_steps is None else f"{self.num_steps} and {self.epochs} are"
            raise ValueError(f"a stage has num_steps or epochs, and {given} given; set one, and the other to null")
        return self

    @model_validator(mode="after")
    def _rates_have_an_effect(self) -> "Stage":
        if idle := [part for part in self.learning_rates if part not in self.trainable]:
            raise ValueError(f"learning_rates names {idle}, which do not train; trainable is {list(self.trainable)}")
        if len(set(self.trainable)) != len(self.trainable):
            raise ValueError(f"trainable names a part twice: {list(self.trainable)}")
        return self

    @model_validator(mode="after")
    def _tuning_has_an_effect(self) -> "Stage":
        if self.tuning.kind != "full" and "language_model" not in self.trainable:
            raise ValueError(
                f"tuning {self.tuning.kind!r} trains the language model, which does not train here; trainable is "
                f"{list(self.trainable)}: add language_model, or remove tuning"
            )
        return self

    def peak_rate(self, part: Component) -> float:
        """The peak learning rate of a part."""
        return self.learning_rates.get(part, self.learning_rate)
