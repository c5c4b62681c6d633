"""What crosses process boundaries in training: configs, artifact references and errors, all small and frozen."""

from pathlib import Path

from pydantic import ValidationError

from vila_ops.artifacts.kinds import Checkpoint, Dataset, Pretrained
from vila_ops.config import NO_CONTEXT, Config, Model, Resources, RunContext, Stage
from vila_ops.errors import CorruptArtifact

HUNG = 75
"""Exit code of a process whose step hung: EX_TEMPFAIL of sysexits.h, which says that another try may succeed."""


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
    """The rank of this worker and the number of workers."""

    rank: int = 0
    world_size: int = 1


class BadSample(Config):
    """A sample of a step that went wrong."""

    key: str
    source: str
    id: str
    """Id of the sample's record in its source."""


class BadSampleReport(Config):
    """The samples of a step whose loss or gradient norm is not finite; `vila-ops data quarantine --from` reads it."""

    stage: str
    mixture: str
    data: str
    """Digest of the dataset."""
    step: int
    what: str
    """The quantity that is not finite: loss or gradient norm."""
    value: str
    samples: tuple[BadSample, ...]

    @classmethod
    def read(cls, path: Path) -> "BadSampleReport":
        """The report in a file. Raises CorruptArtifact."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise CorruptArtifact(
                f"{path} is not the report of a stage that stopped, or it is damaged; name the mixture and the samples "
                f"instead, with --mixture and --sample: the stage's log has their keys"
            ) from error


class TrainJob(Config):
    """One attempt at one stage, as every worker gets it."""

    stage: Stage
    data: Dataset
    init: Checkpoint | Pretrained
    resources: Resources
    context: RunContext
    attempt: str
    """Folder that rank 0 writes the trained model to."""
    resume: str
    """Folder or S3 prefix of the resume checkpoints, which all attempts share."""
    run_id: str | None
    """MLflow run that rank 0 logs to."""
    fresh_projector: bool
    """Whether the projector has random weights, as no stage has trained it yet."""

    def feature_cache(self) -> Path:
        """Folder of cached features of frozen towers."""
        return self.resources.storage.scratch() / "features"

    def diagnostics(self) -> Path:
        """Folder of heartbeats, stacks of hung ranks, bad samples and loss spikes, which all attempts share."""
        return self._shared("diagnostics")

    def sample_log(self) -> Path:
        """Folder in which the ranks record the samples that they read, which all attempts share."""
        return self._shared("sample_log")

    def ray_train(self) -> Path:
        """Folder of Ray Train's own files while it trains."""
        return self._shared("ray_train")

    def _shared(self, kind: str) -> Path:
        """A folder by the stage's address, so that all attempts share it."""
        return self.resources.storage.scratch() / kind / Path(self.resume).name
