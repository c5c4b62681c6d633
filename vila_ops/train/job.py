"""What every worker of a stage is told: configs and handles, small enough to travel anywhere."""

from pathlib import Path

from vila_ops.artifacts.kinds import Checkpoint, Dataset, Pretrained
from vila_ops.artifacts.store import CorruptArtifact
from vila_ops.config import NO_CONTEXT, Config, Model, Resources, RunContext, Stage

HUNG = 75
"""Exit code of a process whose step hung: EX_TEMPFAIL of sysexits.h, so that whoever started it may try again."""


class NonFiniteLoss(RuntimeError):
    """The loss of a step, or its gradient, is not a number; nothing was updated."""


class HungStep(RuntimeError):
    """A step took far longer than those before it, and its processes were ended; another try may fix it."""


FINAL = (ValueError, NonFiniteLoss)
"""What is the same at the second try: wrong settings, damaged or bad data, a loss that is no number.

Anything else may be fixed by another try: a worker that died, a step that hung, a disk or a network that failed.
"""


class RemoteError(Config):
    """An error of FINAL on its way from one process to another."""

    kind: str
    message: str

    @classmethod
    def of(cls, error: Exception) -> "RemoteError":
        """What tells of an error."""
        return cls(kind=type(error).__name__, message=str(error))

    def again(self) -> Exception:
        """The error to raise here; one of a kind with no name in this module is told as ValueError, which it is."""
        kinds = {kind.__name__: kind for kind in (NonFiniteLoss, CorruptArtifact)}
        return kinds.get(self.kind, ValueError)(self.message)


class StageInputs(Config):
    """The arguments of `train_stage`."""

    stage: Stage
    model: Model
    data: Dataset
    init: Checkpoint | Pretrained
    resources: Resources
    context: RunContext = NO_CONTEXT


class JobPayload(StageInputs):
    """The arguments of `train_stage` for a Ray job."""

    working_directory: str
    """Working directory of the submitting process. Relative paths refer to it, if the head has such a folder."""


class RankInfo(Config):
    """Which of how many workers this is."""

    rank: int = 0
    world_size: int = 1


class BadSamples(Config):
    """A sample of a step that went wrong."""

    key: str
    source: str
    id: str
    """Of its record."""


class Stopped(Config):
    """A step whose loss or gradient was no number, beside the run: `vila-ops data quarantine --from` reads it."""

    stage: str
    mixture: str
    data: str
    """Digest of the dataset."""
    step: int
    what: str
    value: str
    samples: tuple[BadSamples, ...]


class TrainJob(Config):
    """One attempt at one stage."""

    stage: Stage
    data: Dataset
    init: Checkpoint | Pretrained
    resources: Resources
    context: RunContext
    attempt: str
    """Folder that rank 0 fills with the trained model."""
    resume: str
    """Place of resume checkpoints, a folder or on S3; attempts share it."""
    run_id: str | None
    """MLflow run that rank 0 logs to."""
    fresh_projector: bool
    """The projector has random weights: nothing has trained it yet."""

    def feature_cache(self) -> Path:
        """Where features of frozen towers are kept."""
        return self.resources.storage.scratch() / "features"

    def watch(self) -> Path:
        """What the ranks say of themselves while they train, and of steps that went wrong; attempts share it."""
        return self._shared("watch")

    def samples(self) -> Path:
        """Where ranks write down which samples they read; attempts share it."""
        return self._shared("samples")

    def ray_train(self) -> Path:
        """What Ray Train keeps of its own while it trains."""
        return self._shared("ray_train")

    def _shared(self, kind: str) -> Path:
        """Of the stage's address, not of one attempt."""
        return self.resources.storage.scratch() / kind / Path(self.resume).name
