"""What one training stage is: what trains, on what, how long, how fast."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from vila_ops.config.base import Config
from vila_ops.config.mixture import Mixture
from vila_ops.config.model import Component


class FullTuning(Config):
    """Every weight of the language model trains."""

    kind: Literal["full"] = "full"


class Lora(Config):
    """Low-rank adapters on every linear layer of the language model but the head; sealed merged, and as an adapter."""

    kind: Literal["lora"] = "lora"
    rank: PositiveInt = 64
    alpha: PositiveFloat = 16.0
    """Adapters count alpha / rank times (NVlabs' default: 16 at rank 64)."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    quantise: Literal["nf4"] | None = None
    """Keep the frozen weights in 4 bits while training (QLoRA); needs bitsandbytes."""


class VisualExpert(Config):
    """A second set of QKV and FFN weights for image tokens trains; the language model's own stay as they are.

    The paper's Table 8, after CogVLM. It starts as a copy, and a model that has one keeps it in later stages.
    """

    kind: Literal["visual_expert"] = "visual_expert"


Tuning = Annotated[FullTuning | Lora | VisualExpert, Field(discriminator="kind")]


class Stage(Config):
    """One training stage. Everything here changes the numbers; what only changes the speed is in Resources."""

    name: str
    mixture: Mixture
    trainable: tuple[Component, ...] = Field(min_length=1)
    tuning: Tuning = FullTuning()
    """How the language model trains where it does."""
    image_size: PositiveInt | None = None
    """Side in pixels of the squares from this stage on; None: as before it. The tower's positions are interpolated."""
    num_steps: PositiveInt | None = None
    """Optimizer steps; either these or epochs."""
    epochs: PositiveFloat | None = None
    """Passes over the mixture; what the last step lacks of a global batch are the first rows of the next pass."""
    global_batch_size: PositiveInt
    """Rows per optimizer step, over all workers and micro-batches; without packing a row is a sample."""
    pack: bool = True
    """Several samples in a row, as many as fit. False: one, as in the paper's runs."""
    sequence_length: PositiveInt
    """Length of a row, image tokens included; without packing the most that a row may have."""
    learning_rate: PositiveFloat
    """Peak rate; of every part that has no rate of its own."""
    learning_rates: dict[Component, PositiveFloat] = {}
    """Peak rates of single parts."""
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    final_ratio: float = Field(default=0.0, ge=0, le=1)
    """The cosine ends at this share of the peak rate."""
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: PositiveFloat | None = 1.0
    """Global norm that the gradient is clipped to; None: not clipped."""
    precision: Literal["fp32", "bf16"]
    """Of the forward and backward pass; master weights and moments are fp32 either way."""
    save_every: PositiveInt
    """Steps between resume checkpoints."""
    validate_every: PositiveInt
    """Steps between validations; the stage also validates before its first and after its last step."""
    validation_rows: PositiveInt = 16
    """Rows of the validation split that a validation reads."""
    seed: int = 0
    """Of the sample order."""

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
                f"tuning {self.tuning.kind!r} is of the language model, which does not train; trainable is "
                f"{list(self.trainable)}: add language_model, or leave tuning out"
            )
        return self

    def peak_rate(self, part: Component) -> float:
        """The peak learning rate of a part."""
        return self.learning_rates.get(part, self.learning_rate)
