"""When a champion is trained on, with what, and what may stop it. A file of its own, as a schedule reads it."""

from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from vila_ops.config.base import Config, Slug
from vila_ops.config.clean import NearDuplicates
from vila_ops.config.schedule import Schedule
from vila_ops.config.sources import Source

HOURS_PER_YEAR = 8766.0
"""365.25 days."""
Fraction = Annotated[float, Field(ge=0, le=1)]


class Quality(Config):
    """When a delivery is refused as a whole, whatever is left of it after cleaning."""

    max_bad_share: Fraction = 0.05
    """Largest share of its records that cannot be read."""
    max_duplicate_share: Fraction = 0.5
    """Largest share of its records that repeat data which the champion was trained on, or earlier deliveries."""
    max_leaking_share: Fraction = 0.0
    """Largest share of its records that overlap with test objects of the recipe's final suite. These records are left
    out in any case."""


class DriftRules(Config):
    """When embeddings count as drifted: by a test that keeps a yearly number of false alarms, and by an effect."""

    false_alarms_per_year: PositiveFloat = 1.0
    """Expected number, over all windows of a year and all streams, where nothing drifts."""
    min_effect: Fraction = 0.01
    """Least share of the spread of embeddings that the change explains; Cohen (1988) calls 0.01 small, 0.06 medium."""
    max_samples: int = Field(default=500, ge=20)
    """Samples drawn of each side of a comparison."""


class FeedbackRules(Config):
    """When people's ratings of the champion's answers ask for retraining. The service has to keep requests."""

    max_bad_share: float = Field(default=0.3, gt=0, lt=1)
    """Fraction of answers called bad that a slice has to exceed surely."""
    level: float = Field(default=0.05, gt=0, lt=1)
    """Chance, over all slices of a look, that a slice is named which does not exceed it."""
    event_ratings: PositiveInt = 50
    """How many new ratings are an event."""


class Budget(Config):
    """What retraining may take, by the planner's estimate."""

    hours: PositiveFloat | None = None
    """None: not limited."""
    cost: PositiveFloat | None = None
    """In the currency of `price_per_hour` of the resources' accelerator; None: not limited."""
    days: PositiveFloat = 30.0
    """The period over which retrainings share the budget."""


class CanaryPolicy(Config):
    """When a canary that the router has not taken back becomes the champion."""

    hours: NonNegativeFloat = 24.0
    """Least time that it answers its share of the conversations."""


class RetrainPolicy(Config):
    """The rules of retraining. Deliveries, drift and feedback ask for it; cool-down, budget and gate may refuse it."""

    watch: dict[Slug, Source] = Field(min_length=1)
    """Places of new data: `path` (and `images`) of each source is a folder, and each folder directly below is a
    delivery, which stays as it is once it is there. Its records are read by the other settings of the source."""
    stage: str
    """Stage of the recipe whose settings and data are used, together with the deliveries."""
    start_after: str | None = None
    """Training goes on from the model that the champion was after this stage; None: from the champion itself."""
    replay: float = Field(gt=0, lt=1)
    """Fraction of the samples (tokens, where the stage's blend says so) that are data the champion was trained on."""
    num_steps: PositiveInt | None = None
    """Steps of a retraining; None: those of the stage."""
    learning_rate: PositiveFloat | None = None
    """Peak rate of a retraining, for every part that trains; None: the stage's rates."""
    new_samples: PositiveInt
    """Usable new training samples that are reason enough."""
    min_new_samples: PositiveInt
    """Fewest with which a retraining for another reason (drift, feedback) makes sense."""
    settle_minutes: NonNegativeFloat = 10.0
    """How long nothing in a delivery must have changed before it is read."""
    cool_down_hours: NonNegativeFloat = 24.0
    """Least time between two retrainings."""
    near_duplicates: NearDuplicates | None = NearDuplicates(image_bits=4, text_similarity=0.8)
    """When a record of a delivery repeats an earlier one; used where the stage's mixture has no rule of its own."""
    quality: Quality = Quality()
    drift: DriftRules | None = DriftRules()
    """None: embeddings are not compared."""
    feedback: FeedbackRules | None = None
    budget: Budget = Budget()
    schedule: Schedule = Schedule()
    """The windows in which drift is looked at once."""
    canary: CanaryPolicy | None = CanaryPolicy()
    """None: a model that passes the gate becomes the champion at once."""

    @model_validator(mode="after")
    def _watched_sources_are_folders(self) -> "RetrainPolicy":
        if packaged := [name for name, source in self.watch.items() if getattr(source, "path", None) is None]:
            raise ValueError(f"watch names {packaged}, which read pinned packages; watch sources that have a path")
        return self

    @model_validator(mode="after")
    def _fewest_is_not_more_than_enough(self) -> "RetrainPolicy":
        if self.min_new_samples > self.new_samples:
            raise ValueError(
                f"min_new_samples {self.min_new_samples} exceeds new_samples {self.new_samples}, so the latter has no "
                f"effect; lower the first or raise the second"
            )
        return self

    @model_validator(mode="after")
    def _weights_come_from_replay(self) -> "RetrainPolicy":
        if weighted := [name for name, one in self.watch.items() if one.weight is not None or one.repeats is not None]:
            raise ValueError(f"watch.{weighted[0]} sets a weight or repeats, which `replay` gives; remove it")
        return self
