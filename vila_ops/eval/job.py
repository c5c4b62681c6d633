"""What an evaluating process is told."""

from vila_ops.artifacts.kinds import Checkpoint, Dataset, Pretrained
from vila_ops.config import Config, Resources, Suite


class EvalJob(Config):
    """One evaluation, small enough to travel."""

    suite: Suite
    model: Checkpoint | Pretrained
    data: Dataset
    resources: Resources
