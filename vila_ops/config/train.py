"""What one training stage is: what trains, on what, how long, how fast."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from vila_ops.config.base import Config
from vila_ops.config.mixture import Mixture
from vila_ops.config.model import Part


class Stage(Config):
    """One training stage. Everything here changes the numbers; what only changes the speed is in Resources."""

    name: str
    mixture: Mixture
    trainable: tuple[Part, ...] = Field(min_length=1)
    num_steps: PositiveInt
    global_batch_size: PositiveInt
    """Packed rows per optimizer step, over all workers and micro-batches."""
    row_tokens: PositiveInt
    """Length of a packed row, image tokens included."""
    learning_rate: PositiveFloat
    """Peak rate; of every part that has no rate of its own."""
    learning_rates: dict[Part, PositiveFloat] = {}
    """Peak rates of single parts."""
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    final_ratio: float = Field(default=0.0, ge=0, le=1)
    """The cosine ends at this share of the peak rate."""
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: PositiveFloat = 1.0
    """Global norm that the gradient is clipped to."""
    precision: Literal["fp32", "bf16"]
    """Of the forward and backward pass; master weights and moments are fp32 either way."""
    save_every: PositiveInt
    """Steps between resume checkpoints."""
    validate_every: PositiveInt
    """Steps between validations; the stage also validates before its first and after its last step."""
    validation_rows: PositiveInt = 16
    """Packed rows of the validation split that a validation reads."""
    seed: int = 0
    """Of the sample order."""

    @model_validator(mode="after")
    def _rates_have_an_effect(self) -> "Stage":
        if idle := [part for part in self.learning_rates if part not in self.trainable]:
            raise ValueError(f"learning_rates names {idle}, which do not train; trainable is {list(self.trainable)}")
        if len(set(self.trainable)) != len(self.trainable):
            raise ValueError(f"trainable names a part twice: {list(self.trainable)}")
        return self

    def peak_rate(self, part: Part) -> float:
        """The peak learning rate of a part."""
        return self.learning_rates.get(part, self.learning_rate)
