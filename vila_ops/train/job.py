"""What every worker of a stage is told: configs and handles, small enough to travel anywhere."""

from pathlib import Path

from vila_ops.artifacts.kinds import Checkpoint, Dataset, Pretrained
from vila_ops.config import Config, Resources, Stage


class NonFiniteLoss(RuntimeError):
    """The loss of a step, or its gradient, is not a number; nothing was updated."""


class Place(Config):
    """Which of how many workers this is."""

    rank: int = 0
    world_size: int = 1


class Job(Config):
    """One attempt at one stage."""

    stage: Stage
    data: Dataset
    init: Checkpoint | Pretrained
    resources: Resources
    attempt: str
    """Folder that rank 0 fills with the trained model."""
    resume: str
    """Folder of resume checkpoints; attempts share it."""
    run_id: str | None
    """MLflow run that rank 0 logs to."""
    fresh_projector: bool
    """The projector has random weights: nothing has trained it yet."""

    def feature_cache(self) -> Path:
        """Where features of frozen towers are kept."""
        return self.resources.scratch() / "features"

    def plan_cache(self) -> Path:
        """Where the order of samples is kept."""
        return self.resources.scratch() / "plans"
